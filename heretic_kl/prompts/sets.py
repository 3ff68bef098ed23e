"""The prompt sets of a run by kind and use, checked against each other. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from heretic_kl.prompts.loading import Prompt, fingerprint, load_prompts
from heretic_kl.prompts.source import DatasetSpec
from heretic_kl.prompts.specs import KINDS, USES, Kind, Use, resolve_specs


@dataclass(frozen=True)
class PromptSets:
    """Prompts by kind and use, with where they came from."""

    prompts: Mapping[tuple[Kind, Use], tuple[Prompt, ...]]
    specs: Mapping[tuple[Kind, Use], DatasetSpec]
    prompt_set: Literal["hub", "builtin"] = "builtin"
    """What filled the tables that name no source."""
    notices: tuple[str, ...] = ()
    """What the user should know about them."""

    def __getitem__(self, key: tuple[Kind, Use]) -> tuple[Prompt, ...]:
        """The prompts of one kind and use: `sets["harmful", "train"]`."""
        return self.prompts[key]

    def of(self, use: Use) -> dict[Kind, tuple[Prompt, ...]]:
        """Every kind of one use."""
        return {kind: self.prompts[kind, use] for kind in KINDS}

    def texts(self, use: Use) -> dict[Kind, tuple[str, ...]]:
        """What users say in every prompt of one use, by kind."""
        return {k: tuple(prompt.user for prompt in members) for k, members in self.of(use).items()}

    def sample(self, count: int) -> tuple[Prompt, ...]:
        """The first harmful and the first harmless training prompts, `count` of each."""
        return self["harmful", "train"][:count] + self["harmless", "train"][:count]

    def only_harmless(self) -> frozenset[Prompt]:
        """Harmless prompts of every use that are in no set of another kind."""
        harmless, others = set[Prompt](), set[Prompt]()
        for (kind, _), members in self.prompts.items():
            (harmless if kind == "harmless" else others).update(members)
        return frozenset(harmless - others)

    def fingerprints(self) -> dict[str, str]:
        """sha256 by set, `harmful.train` and so on."""
        return {f"{kind}.{use}": fingerprint(self[kind, use]) for kind, use in self.prompts}

    def sources(self) -> dict[str, str]:
        """Where each set is from, for people."""
        return {f"{kind}.{use}": self.specs[kind, use].describe() for kind, use in self.prompts}


def load_prompt_sets(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    prompt_set: Literal["auto", "hub", "builtin"],
) -> PromptSets:
    """Load the set of every kind and use.

    Args:
        tables: see `heretic_kl.prompts.resolve_specs`.
        prompt_set: what fills the tables that name no source.

    Raises:
        PromptError: a set cannot be read or is empty.
    """
    resolved = resolve_specs(tables, prompt_set)
    prompts = {
        (kind, use): tuple(load_prompts(resolved.specs[kind, use]))
        for kind in KINDS
        for use in USES
    }
    notices = () if resolved.notice is None else (resolved.notice,)
    return PromptSets(prompts, resolved.specs, resolved.prompt_set, notices + _overlaps(prompts))


def _overlaps(prompts: Mapping[tuple[Kind, Use], tuple[Prompt, ...]]) -> tuple[str, ...]:
    """One line for each use that shares prompts with the test prompts of its kind."""
    notices = []
    for kind in KINDS:
        test_prompts = set(prompts[kind, "test"])
        for use in USES[:-1]:
            shared = len(test_prompts & set(prompts[kind, use]))
            if shared:
                notices.append(
                    f"{shared} of {len(test_prompts)} {kind} test prompts are also {use} prompts: "
                    "test figures will look better than they are"
                )
    return tuple(notices)
