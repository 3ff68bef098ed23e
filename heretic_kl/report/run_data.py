"""What a run recorded beside its study as rows of plain values. Draws nothing.

Every function gives nothing where the run recorded nothing of the kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from os.path import commonprefix
from typing import Any, Final

from heretic_kl.report.wording import label
from heretic_kl.scoring import Score

Run = Mapping[str, Any]
"""The content of a `RunFile`."""
MEASURES: Final = {
    "auroc": "AUROC, held-out prompts",
    "silhouette": "silhouette",
    "cosine": "cosine of the means",
    "distance": "distance / norm",
}
"""Measure of separation -> its name on an axis."""
PROMPTS_OF: Final = {"refusals": "harmful", "false_refusals": "borderline", "judge": "harmful"}
"""Plug-in that says what came of each prompt -> their kind, where its settings name none."""
DECLINES: Final[Mapping[str, bool]] = {
    **dict.fromkeys(("refused", "refusal", "evasion"), True),
    **dict.fromkeys(("not", "answered"), False),
}
"""Verdict of the phrases or of a judge -> whether the response refuses or evades."""
APART: Final = "≠"
"""Stands before a verdict that differs from that of the phrases."""
SIDES: Final = (("refused", "harmful"), ("answered", "harmless"))
"""Group of prompts -> its name where all prompts of a kind were used."""


@dataclass(frozen=True)
class PairedResponse:
    """One prompt, what the original says, and what it says under each edit."""

    kind: str
    number: int
    """Of the prompt among those of its kind, from 1."""
    prompt: str
    original: str
    edited: Mapping[str, str]
    """By name, `trial 17`."""
    beside: int = 1
    """How many of them, from the first, stand beside the original's."""

    @property
    def shared(self) -> int:
        """Characters that all that stand side by side begin with."""
        shown = list(self.edited.values())[: self.beside]
        return len(commonprefix([self.original, *shown])) if shown else 0


@dataclass(frozen=True)
class Verdicts:
    """What came of the prompts of one kind, as every scorer of them sees it."""

    scorers: tuple[str, ...]
    """Phrases before judges."""
    prompts: tuple[str, ...]
    columns: Mapping[str, Sequence[str]]
    """`original`, or `original: judge` where there are several scorers -> a verdict a prompt.

    Of phrases `refused`, `not` or `degenerate (loop)`, of a judge its class. `APART` marks those
    that contradict the first scorer's.
    """

    @property
    def contradictions(self) -> dict[str, int]:
        """Column of a further scorer -> so many of its verdicts contradict the first one's."""
        first = f": {label(self.scorers[0])}"
        return {
            name: sum(word.startswith(APART) for word in words)
            for name, words in self.columns.items()
            if len(self.scorers) > 1 and not name.endswith(first)
        }


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


def study_responses(
    run: Run, first: int | None, *, harmful: bool
) -> tuple[list[PairedResponse], int]:
    """Responses side by side; `first` is the trial that comes first. See `paired_responses`."""
    by_model = dict(run.get("responses", {}))
    original = by_model.pop("reference", {})
    numbers = sorted(map(int, by_model), key=lambda n: (n != first, n))
    edited = {f"trial {n}": by_model[str(n)] for n in numbers}
    return paired_responses(run.get("test_prompts", {}), original, edited, harmful=harmful)


def paired_responses(
    prompts: Mapping[str, Sequence[str]],
    original: Mapping[str, Sequence[str]],
    edited: Mapping[str, Mapping[str, Sequence[str]]],
    *,
    harmful: bool,
    beside: int = 1,
) -> tuple[list[PairedResponse], int]:
    """Responses side by side.

    Args:
        prompts: by kind.
        original: its responses to the first of them, by kind.
        edited: the same by the name of the edit.
        harmful: whether responses to harmful prompts are shown.
        beside: edits that stand beside the original.

    Returns:
        The pairs; to how many harmful prompts they are left out.
    """
    pairs, left_out = [], 0
    for kind, texts in original.items():
        if kind == "harmful" and not harmful:
            left_out = len(texts)
            continue
        for index, text in enumerate(texts):
            said = {name: responses.get(kind, ()) for name, responses in edited.items()}
            shown = {name: of_edit[index] for name, of_edit in said.items() if index < len(of_edit)}
            prompt = prompts[kind][index]
            pairs.append(PairedResponse(kind, index + 1, prompt, text, shown, beside))
    return pairs, left_out


def verdicts(
    prompts: Mapping[str, Sequence[str]],
    scorers: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Score]],
) -> list[Verdicts]:
    """What came of every prompt, one table for each kind of prompts that a scorer decides on.

    Args:
        prompts: by kind.
        scorers: their tables in the settings.
        scores: by name of the model, the original first, then by scorer.
    """
    of_kind: dict[str, list[str]] = {}
    for name in next(iter(scores.values()), {}):
        of_kind.setdefault(_kind(name, scorers.get(name, {})), []).append(name)
    tables = []
    for kind, names in of_kind.items():
        shown = tuple(prompts.get(kind, ()))
        words = {
            (model, name): _words_of(of_model[name].details, len(shown))
            for model, of_model in scores.items()
            for name in names
            if name in of_model
        }
        words = {key: said for key, said in words.items() if said}
        decided = {name: "refused" in scores[model][name].details for model, name in words}
        ordered = sorted(decided, key=lambda name: not decided[name])
        columns: dict[str, list[str]] = {}
        for model in dict.fromkeys(model for model, _ in words):
            first = words.get((model, ordered[0]), [])
            for name in ordered:
                if (model, name) in words:
                    title = f"{model}: {label(name)}" if len(ordered) > 1 else model
                    columns[title] = _marked(words[model, name], first)
        if columns:
            tables.append(Verdicts(tuple(ordered), shown, columns))
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


def _kind(scorer: str, table: Mapping[str, Any]) -> str:
    """The kind of prompts that a scorer decides on; empty: unknown."""
    kind = (table.get("settings") or {}).get("prompts")
    return str(kind or PROMPTS_OF.get(table.get("use") or scorer, ""))


def _marked(words: Sequence[str], first: Sequence[str]) -> list[str]:
    """Verdicts, with a mark where they contradict the first scorer's."""
    sides = [(DECLINES.get(word), DECLINES.get(other)) for word, other in zip_longest(words, first)]
    return [
        f"{APART} {word}" if None not in side and side[0] != side[1] else word
        for word, side in zip(words, sides, strict=True)
    ]


def _words_of(details: Mapping[str, Any], prompts: int) -> list[str]:
    """A verdict in words for each prompt; nothing where a scorer gives none.

    Older studies do not say where what is degenerate is, nor what a judge says of each prompt.
    """
    judged = details.get("verdicts")
    if isinstance(judged, list) and len(judged) == prompts:
        return list(map(str, judged))
    if not isinstance(details.get("refused"), list):
        return []
    refused, broken = set(details["refused"]), details.get("degenerate_at", {})
    words = ("refused" if place in refused else "not" for place in range(prompts))
    return [
        f"degenerate ({broken[str(place)]})" if str(place) in broken else word
        for place, word in enumerate(words)
    ]
