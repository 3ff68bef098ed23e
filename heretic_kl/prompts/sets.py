"""The six prompt sets of a run, loaded and checked against each other. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from heretic_kl.prompts.loading import (
    DatasetSpec,
    Prompt,
    PromptSplits,
    fingerprint,
    load_prompts,
    resolve_specs,
)

Kind = Literal["harmful", "harmless"]
Split = Literal["train", "search", "report"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless")
SPLITS: tuple[Split, ...] = ("train", "search", "report")


@dataclass(frozen=True)
class PromptSets:
    """Prompts by kind and use, with where they came from."""

    prompts: Mapping[tuple[Kind, Split], tuple[Prompt, ...]]
    specs: PromptSplits
    notices: tuple[str, ...] = ()
    """What the user should know about them."""

    @property
    def harmful_train(self) -> tuple[Prompt, ...]:
        """Prompts that draw the behaviour, to find the directions."""
        return self.prompts["harmful", "train"]

    @property
    def harmless_train(self) -> tuple[Prompt, ...]:
        """Prompts that do not, to find the directions."""
        return self.prompts["harmless", "train"]

    @property
    def harmless_search(self) -> tuple[Prompt, ...]:
        """Prompts whose answers must not change."""
        return self.prompts["harmless", "search"]

    @property
    def search_prompts(self) -> tuple[Prompt, ...]:
        """Everything a trial is measured on."""
        return self.prompts["harmful", "search"] + self.prompts["harmless", "search"]

    def of(self, split: Split) -> dict[Kind, tuple[Prompt, ...]]:
        """Both kinds of one split."""
        return {kind: self.prompts[kind, split] for kind in KINDS}

    def sample(self, count: int) -> tuple[Prompt, ...]:
        """The first training prompts, `count` of each kind."""
        return self.harmful_train[:count] + self.harmless_train[:count]

    def fingerprints(self) -> dict[str, str]:
        """sha256 by set, `harmful.train` and so on."""
        return {f"{k}.{s}": fingerprint(self.prompts[k, s]) for k, s in self.prompts}

    def sources(self) -> dict[str, str]:
        """Where each set is from, for people."""
        return {f"{k}.{s}": self._spec(k, s).describe() for k, s in self.prompts}

    def _spec(self, kind: Kind, split: Split) -> DatasetSpec:
        spec = getattr(self.specs, f"{kind}_{split}")
        assert isinstance(spec, DatasetSpec)
        return spec


def load_prompt_sets(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    prompt_set: Literal["auto", "hub", "builtin"],
) -> PromptSets:
    """Load all six sets.

    Args:
        tables: see `heretic_kl.prompts.resolve_specs`.
        prompt_set: what fills the tables that name no source.

    Raises:
        PromptError: a set cannot be read or is empty.
    """
    resolved = resolve_specs(tables, prompt_set)
    prompts: dict[tuple[Kind, Split], tuple[Prompt, ...]] = {}
    for kind in KINDS:
        for split in SPLITS:
            spec = getattr(resolved.splits, f"{kind}_{split}")
            prompts[kind, split] = tuple(load_prompts(spec))
    notices = () if resolved.notice is None else (resolved.notice,)
    return PromptSets(prompts, resolved.splits, notices + _overlaps(prompts))


def _overlaps(prompts: Mapping[tuple[Kind, Split], tuple[Prompt, ...]]) -> tuple[str, ...]:
    """A figure measured on prompts that were searched on is better than the truth."""
    found = []
    for kind in KINDS:
        report = set(prompts[kind, "report"])
        for split in ("train", "search"):
            shared = len(report & set(prompts[kind, split]))
            if shared:
                found.append(
                    f"{shared} of {len(report)} {kind} report prompts are also {split} prompts: "
                    "reported figures will look better than they are"
                )
    return tuple(found)
