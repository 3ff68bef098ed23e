"""Candidates beside the original, every scorer, as sections of lines. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from heretic_kl.report.details import DetailSection
from heretic_kl.report.wording import label

if TYPE_CHECKING:
    from heretic_kl.scoring import PairedDifference, Score


class EvaluatedCandidate(Protocol):
    """What the table needs of a candidate."""

    @property
    def name(self) -> str:
        """As the user named it."""
        ...

    @property
    def scores(self) -> Mapping[str, Score]:
        """By scorer."""
        ...

    @property
    def minus_original(self) -> Mapping[str, PairedDifference]:
        """Paired by prompt."""
        ...

    @property
    def minus_first(self) -> Mapping[str, PairedDifference]:
        """Paired by prompt; empty for the first candidate."""
        ...


def evaluation_sections(
    original: Mapping[str, Score], candidates: Sequence[EvaluatedCandidate], where: str
) -> tuple[DetailSection, ...]:
    """A section a scorer: the original, every candidate, and the paired differences.

    `where` follows the scorer's name: `on the test prompts`.
    """
    return tuple(
        DetailSection(
            f"{label(scorer)} {where}",
            tuple(_rows(scorer, score, candidates)),
        )
        for scorer, score in original.items()
    )


def evaluation_footnotes(candidates: Sequence[EvaluatedCandidate]) -> list[str]:
    """What a reader of the sections has to know."""
    notes = ["Differences are paired by prompt; in parentheses their 95% interval."]
    pairs = [
        pair for c in candidates for pair in (*c.minus_original.values(), *c.minus_first.values())
    ]
    if any(not pair.distinguishable for pair in pairs):
        notes.append("*: the interval holds 0, so the two may be equally good.")
    return notes


def _rows(
    scorer: str, original: Score, candidates: Sequence[EvaluatedCandidate]
) -> Iterator[tuple[str, ...]]:
    several = len(candidates) > 1
    yield ("", "score", "minus original", *(["minus the first"] if several else []))
    yield "original", original.text
    for candidate in candidates:
        yield (
            candidate.name,
            candidate.scores[scorer].text,
            _difference(candidate.minus_original.get(scorer)),
            *([_difference(candidate.minus_first.get(scorer))] if several else []),
        )


def _difference(pair: PairedDifference | None) -> str:
    if pair is None:
        return "–"
    mark = "" if pair.distinguishable else " *"
    if pair.interval is None:
        return f"{pair.mean:+.4g}{mark}"
    low, high = pair.interval
    return f"{pair.mean:+.4g} ({low:+.4g} to {high:+.4g}){mark}"
