"""What a run recorded beside its study as rows of plain values. Draws nothing.

Every function gives nothing where the run recorded nothing of the kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any, Final

from heretic_kl.scoring import Score
from heretic_kl.search import StoredStudy

Run = Mapping[str, Any]
"""The content of a `RunFile`."""
MEASURES: Final = {
    "auroc": "AUROC, held-out prompts",
    "silhouette": "silhouette",
    "cosine": "cosine of the means",
    "distance": "distance / norm",
}
"""Measure of separation -> its name on an axis."""
PROMPTS_OF: Final = {"refusals": "harmful", "false_refusals": "borderline"}
"""Plug-in that counts refusals -> the kind of its prompts."""
SIDES: Final = (("refused", "harmful"), ("answered", "harmless"))
"""Group of prompts -> its name where all prompts of a kind were used."""


@dataclass(frozen=True)
class PairedResponse:
    """One prompt, what the original says, and what it says under each trial's edit."""

    kind: str
    prompt: str
    original: str
    edited: Mapping[int, str]
    """By trial number, the chosen trial first."""
    shared: int
    """Characters that the original and the first trial begin with, both."""


@dataclass(frozen=True)
class Verdicts:
    """Which prompts of one kind were refused, by whom."""

    scorer: str
    prompts: tuple[str, ...]
    refused: Mapping[str, frozenset[int]]
    """`original`, `trial 17` -> positions of the prompts that it refuses."""


def separation_rows(run: Run) -> list[dict[str, Any]]:
    """Every measure of separation at every layer."""
    table = dict(run.get("directions", {}).get("layers", {}))
    if not table:
        return []
    lengths = zip(table["difference_norm"], table["residual_norm"], strict=True)
    table["distance"] = [a / b if a is not None and b else None for a, b in lengths]
    return [
        {"layer": layer, "measure": title, "value": value}
        for name, title in MEASURES.items()
        for layer, value in enumerate(table[name])
        if value is not None
    ]


def norm_rows(run: Run) -> list[dict[str, Any]]:
    """The lengths of residuals and of the difference of their means, layer by layer."""
    table = run.get("directions", {}).get("layers", {})
    names = {"residual_norm": "mean residual norm", "difference_norm": "norm of the difference"}
    return [
        {"layer": layer, "length": value, "of": title}
        for name, title in names.items()
        for layer, value in enumerate(table.get(name, ()))
        if value is not None
    ]


def projection_rows(run: Run) -> list[dict[str, Any]]:
    """The points of every projected layer, with what share of the variance the plane holds."""
    directions = run.get("directions", {})
    rows = []
    for projection in directions.get("projections", ()):
        layer, share = projection["layer"], projection["variance"]
        for side, kind in SIDES:
            name = side if directions.get("by_response") else kind
            rows += [
                {"layer": f"layer {layer} ({share:.0%} of variance)", "prompts": name} | _point(p)
                for p in projection[side]
            ]
    return rows


def paired_responses(
    run: Run, first: int | None, *, harmful: bool
) -> tuple[list[PairedResponse], int]:
    """Responses side by side; `first` is the trial that comes first.

    Returns:
        The pairs, without those to harmful prompts unless they are asked for; how many were left
        out.
    """
    by_model: Mapping[str, Mapping[str, Sequence[str]]] = run.get("responses", {})
    originals, prompts = by_model.get("reference", {}), run.get("test_prompts", {})
    numbers = sorted((int(n) for n in by_model if n != "reference"), key=lambda n: (n != first, n))
    pairs, left_out = [], 0
    for kind, texts in originals.items():
        if kind == "harmful" and not harmful:
            left_out = len(texts)
            continue
        for index, text in enumerate(texts):
            said = {n: by_model[str(n)].get(kind, ()) for n in numbers}
            edited = {n: of_trial[index] for n, of_trial in said.items() if index < len(of_trial)}
            shown = next(iter(edited.values()), "")
            shared = len(commonprefix([text, shown])) if edited else 0
            pairs.append(PairedResponse(kind, prompts[kind][index], text, edited, shared))
    return pairs, left_out


def verdicts(run: Run, study: StoredStudy, numbers: Sequence[int]) -> list[Verdicts]:
    """Refused or not, prompt by prompt, for every scorer that counts refusals of test prompts."""
    scorers = study.settings.get("scorers", {})
    tables = []
    for name in study.test_baseline or {}:
        use = scorers.get(name, {}).get("use") or name
        prompts = run.get("test_prompts", {}).get(PROMPTS_OF.get(use, ""), ())
        refused = {"original": _refused(study.test_baseline or {}, name)}
        refused |= {f"trial {n}": _refused(study.tested.get(n, {}), name) for n in numbers}
        counted = {model: places for model, places in refused.items() if places is not None}
        if prompts and counted:
            tables.append(Verdicts(name, tuple(prompts), counted))
    return tables


def visible(text: str) -> str:
    """Text whose control characters are seen instead of obeyed.

    Line breaks and tabs stay. Other control characters become their pictures, and characters that
    change the direction of text, are invisible or are no Unicode become their numbers.
    """
    text = text.replace("\r\n", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda m: chr(0x2400 + ord(m[0])), text)
    return _UNSEEN.sub(lambda m: f"[U+{ord(m[0]):04X}]", text)


_UNSEEN: Final = re.compile(
    "[\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)


def _point(point: Sequence[float]) -> dict[str, float]:
    return {"x": point[0], "y": point[1]}


def _refused(scores: Mapping[str, Score], name: str) -> frozenset[int] | None:
    places = scores[name].details.get("refused") if name in scores else None
    return frozenset(places) if isinstance(places, list) else None
