"""Candidates, or two trials, side by side and paired by prompt, as sections. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from heretic_kl.report.details import DetailSection
from heretic_kl.report.wording import MISSING, cell, label
from heretic_kl.scoring import PairedDifference, agreement_text, paired_scores

if TYPE_CHECKING:
    from heretic_kl.scoring import Score
    from heretic_kl.search import TrialRecord

PAIRED: Final = "paired by prompt; in parentheses their 95% interval."
MAY_BE_EQUAL: Final = "*: the interval holds 0, so the two may be equally good."


@dataclass(frozen=True)
class TrialComparison:
    """Two trials of one study on the same prompts."""

    first: int
    second: int
    """Numbers of the trials."""
    scores: Mapping[str, tuple[Mapping[str, Score], Mapping[str, Score]]]
    """`validation`, `test` -> scores of the first and the second trial, by scorer; without the
    prompts on which one of them was not measured."""

    @property
    def differences(self) -> dict[str, dict[str, PairedDifference | None]]:
        """By prompts and scorer, first minus second; None where values by prompt are missing."""
        return {
            use: {name: paired_scores(ours[name], others[name]) for name in ours if name in others}
            for use, (ours, others) in self.scores.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        plain = {
            use: {name: None if pair is None else vars(pair) for name, pair in pairs.items()}
            for use, pairs in self.differences.items()
        }
        return {"first": self.first, "second": self.second, "differences": plain}


class EvaluatedCandidate(Protocol):
    """What table and page need of a candidate."""

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

    @property
    def responses(self) -> Mapping[str, Sequence[str]]:
        """To the first prompts, by kind; empty where none were generated."""
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


def evaluation_footnotes(
    original: Mapping[str, Score], candidates: Sequence[EvaluatedCandidate]
) -> list[str]:
    """What a reader of the sections has to know."""
    notes = [f"Differences are {PAIRED}"]
    pairs = [
        pair for c in candidates for pair in (*c.minus_original.values(), *c.minus_first.values())
    ]
    if any(not pair.distinguishable for pair in pairs):
        notes.append(MAY_BE_EQUAL)
    models = [("original", original), *((c.name, c.scores) for c in candidates)]
    for scorer in original:
        shares = [
            f"{name} {share}"
            for name, scores in models
            if (share := agreement_text(scores[scorer].details.get("agreement")))
        ]
        if shares:
            notes.append(f"{label(scorer)} and the phrases agree on: {', '.join(shares)}.")
    return notes


def compare_trials(
    first: TrialRecord, second: TrialRecord, tested: Mapping[int, Mapping[str, Score]]
) -> TrialComparison:
    """Two trials of one study; `tested` has scores on the test prompts, by trial number."""
    scores = {"validation": (first.scores, second.scores)}
    if first.number in tested and second.number in tested:
        scores["test"] = (tested[first.number], tested[second.number])
    return TrialComparison(first.number, second.number, scores)


def comparison_sections(comparison: TrialComparison) -> tuple[DetailSection, ...]:
    """A section for the validation prompts, and one for the test prompts where both have them."""
    names = [f"trial {number}" for number in (comparison.first, comparison.second)]
    sections = []
    for use, pairs in comparison.differences.items():
        ours, others = comparison.scores[use]
        rows: list[tuple[str, ...]] = [("scorer", *names, "difference")]
        for name, pair in pairs.items():
            # The interval of the difference is what counts here.
            cells = [cell(replace(side[name], interval=None)) for side in (ours, others)]
            rows.append((label(name), *cells, _difference(pair)))
        title = f"Trial {comparison.first} minus trial {comparison.second}, {use} prompts"
        sections.append(DetailSection(title, tuple(rows)))
    return tuple(sections)


def comparison_footnotes(comparison: TrialComparison) -> list[str]:
    """What a reader of the sections has to know."""
    pairs = [pair for of_use in comparison.differences.values() for pair in of_use.values()]
    notes = []
    if any(pair is not None for pair in pairs):
        notes.append(f"Differences are {PAIRED}")
    if any(pair is not None and not pair.distinguishable for pair in pairs):
        notes.append(MAY_BE_EQUAL)
    if None in pairs:
        notes.append(
            f"{MISSING}: measured before values of single prompts were kept; a trial that is "
            "measured now has them."
        )
    if "test" not in comparison.scores:
        notes.append(
            "Validation scores chose these trials, so they flatter; measure both on the test "
            "prompts to compare them there."
        )
    return notes


def _rows(
    scorer: str, original: Score, candidates: Sequence[EvaluatedCandidate]
) -> Iterator[tuple[str, ...]]:
    several = len(candidates) > 1
    yield ("model", "score", "minus original", *(["minus the first"] if several else []))
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
        return MISSING
    mark = "" if pair.distinguishable else " *"
    if pair.interval is None:
        return f"{pair.mean:+.3g}{mark}"
    low, high = pair.interval
    return f"{pair.mean:+.3g} ({low:+.3g} to {high:+.3g}){mark}"
