"""Which prompts a run uses: a spec for each kind and use. Loads nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from heretic_kl.prompts.hub import hub_reachable
from heretic_kl.prompts.source import DatasetSpec

Kind = Literal["harmful", "harmless", "borderline"]
Use = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless", "borderline")
"""Harmful ones draw the behaviour, harmless ones do not, borderline ones only sound harmful."""
USES: tuple[Use, ...] = ("train", "validation", "test")
"""Train finds the directions, validation measures every trial, test the final trials, once."""


@dataclass(frozen=True)
class ResolvedPrompts:
    """Where every prompt comes from, and what the user should know about that."""

    specs: Mapping[tuple[Kind, Use], DatasetSpec]
    """By kind and use; the three uses of a kind are meant to be disjoint."""
    prompt_set: Literal["hub", "builtin"]  # what filled the tables that name no source
    notice: str | None = None


_HUB_NAMES: dict[Kind, str] = {"harmful": "harmful_behaviors", "harmless": "harmless_alpaca"}
_HUB_PARTS: dict[Use, str] = {"train": "train[:400]", "validation": "test[:100]"}
HUB_SPECS: dict[tuple[Kind, Use], DatasetSpec] = {
    (kind, use): DatasetSpec(f"mlabonne/{name}", split, "text")
    for kind, name in _HUB_NAMES.items()
    for use, split in _HUB_PARTS.items()
}
BUILTIN_SPECS: dict[tuple[Kind, Use], DatasetSpec] = {
    (kind, use): DatasetSpec(f"builtin:{kind}", use) for kind in KINDS for use in USES
}


def resolve_specs(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    prompt_set: Literal["auto", "hub", "builtin"] = "auto",
) -> ResolvedPrompts:
    """The spec of every kind and use, from the prompt tables of a configuration.

    Args:
        tables: kind -> use (train, validation, test) -> the fields of a
            `DatasetSpec`, None where unset; a missing table or field is unset.
        prompt_set: What fills the tables that name no source. The test prompts come from the
            built-in set in either case. "auto" is the hub where it can be reached.
    """
    table: dict[tuple[Kind, Use], dict[str, Any]] = {
        key: dict(tables.get(key[0], {}).get(key[1], {})) for key in BUILTIN_SPECS
    }
    wanted = [spec for key, spec in HUB_SPECS.items() if not table[key].get("source")]
    notice = None
    chosen: Literal["hub", "builtin"] = "builtin" if prompt_set == "builtin" else "hub"
    if prompt_set == "auto" and wanted:
        names = sorted({spec.source for spec in wanted})
        if not hub_reachable(names):
            chosen = "builtin"
            notice = (
                f"{' and '.join(names)} cannot be reached on the hub: using the built-in prompts "
                "(--prompt-set builtin does so without asking the hub)"
            )
    defaults = {**BUILTIN_SPECS, **(HUB_SPECS if chosen == "hub" else {})}
    specs = {key: spec_of(defaults[key], table[key], key[1]) for key in table}
    return ResolvedPrompts(specs, chosen, notice)


def spec_of(default: DatasetSpec, fields: Mapping[str, Any], use: Use) -> DatasetSpec:
    """A default with the fields that are set; built-in sets that name no split are split by use."""
    set_fields = _with_split(fields, use)
    set_fields["more"] = tuple(_with_split(more, use) for more in fields.get("more") or ())
    if not set_fields.get("source"):
        return replace(default, **set_fields)
    return DatasetSpec(**set_fields)


def _with_split(fields: Mapping[str, Any], use: str) -> dict[str, Any]:
    """What is set; a built-in set is split by use."""
    set_fields = {name: value for name, value in fields.items() if value is not None}
    if str(set_fields.get("source")).startswith("builtin:"):
        set_fields.setdefault("split", use)
    return set_fields
