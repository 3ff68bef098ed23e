"""Stop measuring what is surely beaten: exact bounds against the front. Runs no model.

A candidate is left only once a finished trial is at least as good in every objective and better
in one, whatever is still to be measured. See docs/decisions/009-racing.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from heretic_kl.requests import PartialAnswers, PartialRows, Result, SoFar
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
    """What is known, in words, by scorer: `at least 12/40 after 24 answers`."""
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


class Judge(Protocol):
    """One objective, as racing needs it."""

    @property
    def name(self) -> str:
        """Of the scorer."""
        ...

    @property
    def role(self) -> Role:
        """Minimize or maximize."""
        ...

    def score(self, results: Sequence[Result]) -> Score:
        """From all results; asked for the same ones again and again."""
        ...

    def bounds(self, results: Sequence[SoFar]) -> Bounds:
        """From some."""
        ...


class Race:
    """Watches candidates, and ends those that a rival surely beats.

    Args:
        judges: the objectives, in order.
        places: where each judge's results stand among all.
        rivals: finished trials, the front of them is enough.
    """

    def __init__(
        self, judges: Sequence[Judge], places: Mapping[str, slice], rivals: Sequence[Rival]
    ) -> None:
        self._judges = judges
        self._places = places
        self._rivals = rivals
        self.stopped: dict[int, Stopped] = {}

    def __call__(self, candidate: int, results: Sequence[SoFar]) -> bool:
        """Whether the candidate need not go on; see `heretic_kl.requests.Watch`."""
        known = [self._bounds(judge, results) for judge in self._judges]
        best = tuple(
            bounds.low if judge.role == "minimize" else -bounds.high
            for judge, bounds in zip(self._judges, known, strict=True)
        )
        rival = next((rival for rival in self._rivals if _beats(rival.objectives, best)), None)
        if rival is None:
            return False
        findings = {
            judge.name: bounds.text
            for judge, bounds in zip(self._judges, known, strict=True)
            if bounds.text
        }
        self.stopped[candidate] = Stopped(rival.number, findings, best)
        return True

    def _bounds(self, judge: Judge, results: Sequence[SoFar]) -> Bounds:
        own = results[self._places[judge.name]]
        complete = [r for r in own if r is not None and not isinstance(r, _PARTS)]
        if len(complete) == len(own):
            value = judge.score(complete)
            assert value.optimized is not None  # an objective without a value raises
            return Bounds(value.optimized, value.optimized, value.text)
        return judge.bounds(own)


_PARTS = (PartialRows, PartialAnswers)


def _beats(rival: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the rival is no worse anywhere and better somewhere, even at the candidate's best."""
    pairs = list(zip(rival, best, strict=True))
    # Of equals the one measured better stands: it takes a finished measurement to know.
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
