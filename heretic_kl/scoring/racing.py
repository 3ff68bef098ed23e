"""Stop measuring a candidate that a finished trial surely beats. Runs no model, estimates nothing.

A candidate is stopped once a finished trial is at least as good in every objective and better in
one, whatever is still to be measured. See docs/decisions/009-racing.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from heretic_kl.requests import PartialResponses, PartialRows, Result, SoFar
from heretic_kl.scoring.scorer import Bounds, Role, Score


class Rival(Protocol):
    """A finished trial."""

    @property
    def number(self) -> int:
        """Of the trial."""
        ...

    @property
    def objectives(self) -> tuple[float, ...]:
        """In the order of the objectives; smaller is better for all."""
        ...


@dataclass(frozen=True)
class Stopped:
    """A candidate that was not measured to the end, and why."""

    dominated_by: int
    """Number of the trial that beats it."""
    findings: Mapping[str, str]
    """What is known, in words, by scorer: `at least 12/40 after 24 responses`."""
    at_best: tuple[float, ...]
    """The best that its objectives could have been, in their order; smaller is better."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for storage."""
        best = [value if value > -float("inf") else None for value in self.at_best]
        return {
            "dominated_by": self.dominated_by,
            "findings": dict(self.findings),
            "at_best": best,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stopped:
        """The inverse of `to_dict`."""
        best = (-float("inf") if value is None else float(value) for value in data["at_best"])
        return cls(int(data["dominated_by"]), dict(data["findings"]), tuple(best))


class Judge:
    """One objective: its scorer's name, role, score from all results and bounds from some."""

    def __init__(
        self,
        name: str,
        role: Role,
        score: Callable[[Sequence[Result]], Score],
        bounds: Callable[[Sequence[SoFar]], Bounds],
    ) -> None:
        self.name, self.role, self.bounds = name, role, bounds
        self._score = score
        self._scored: list[tuple[tuple[Result, ...], Score]] = []

    def score(self, results: Sequence[Result]) -> Score:
        """The score; the same results, which are asked for again and again, are scored once."""
        for scored_results, score in self._scored:
            if all(a is b for a, b in zip(scored_results, results, strict=True)):
                return score
        score = self._score(results)
        self._scored.append((tuple(results), score))
        return score


class Race:
    """Watches candidates, and stops those that a rival beats.

    Args:
        judges: the objectives, in order.
        places: where each judge's results stand among all.
        rivals: finished trials; the front of them is enough.
    """

    def __init__(
        self, judges: Sequence[Judge], places: Mapping[str, slice], rivals: Sequence[Rival]
    ) -> None:
        self._judges = tuple(enumerate(judges))
        self._places = places
        self._rivals = rivals
        self.stopped: dict[int, Stopped] = {}

    def __call__(self, candidate: int, results: Sequence[SoFar]) -> bool:
        """Whether the candidate need not go on; see `heretic_kl.requests.Watch`."""
        parts = {place: results[self._places[judge.name]] for place, judge in self._judges}
        bounds: dict[int, Bounds] = {}
        rivals = self._rivals
        # What costs least to know first: most candidates have no rival left after that.
        for place, judge in sorted(self._judges, key=lambda entry: _cost(parts[entry[0]])):
            bounds[place] = _bounds(judge, parts[place])
            best = _best(judge, bounds[place])
            rivals = [rival for rival in rivals if rival.objectives[place] <= best]
            if not rivals:
                return False
        at_best = tuple(_best(judge, bounds[place]) for place, judge in self._judges)
        # Of equals the one that is measured whole stands, and only a whole measurement shows it.
        winner = next((rival for rival in rivals if tuple(rival.objectives) != at_best), None)
        if winner is None:
            return False
        texts = {judge.name: bounds[place].text for place, judge in self._judges}
        findings = {name: text for name, text in texts.items() if text}
        self.stopped[candidate] = Stopped(winner.number, findings, at_best)
        return True


_PARTS = (PartialRows, PartialResponses)


def _cost(results: Sequence[SoFar]) -> int:
    """Scores are kept, bounds of nothing are constants, bounds of parts are worked out."""
    if all(result is not None and not isinstance(result, _PARTS) for result in results):
        return 0
    if all(result is None for result in results):
        return 1
    return 3 if any(isinstance(result, PartialRows) for result in results) else 2


def _bounds(judge: Judge, results: Sequence[SoFar]) -> Bounds:
    whole = [r for r in results if r is not None and not isinstance(r, _PARTS)]
    if len(whole) < len(results):
        return judge.bounds(results)
    score = judge.score(whole)
    assert score.optimized is not None  # an objective without a value raises
    return Bounds(score.optimized, score.optimized, score.text)


def _best(judge: Judge, bounds: Bounds) -> float:
    """The best an objective can still be; smaller is better."""
    return bounds.low if judge.role == "minimize" else -bounds.high
