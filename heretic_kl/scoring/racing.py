"""Stop measuring what is beaten: exact bounds against the front, or a stated error. Runs no model.

Without an error rate a candidate is left only once a finished trial is at least as good in every
objective and better in one, whatever is still to be measured. With one it is also left when in
every objective it is either surely no better or worse by a paired test on the prompts measured so
far. See docs/decisions/009-racing.md.

The error is that a candidate is left for a rival that does not beat it once all is measured. Then
there is an objective in which it is not worse in truth, and that one's test must have failed: the
error is not divided among objectives. It is divided among the looks of an objective and among the
rivals tested at a look. Which rivals those are is chosen by what the order of prompts cannot
change: objectives that are measured whole, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from heretic_kl.requests import PartialResponses, PartialRows, Result, SoFar
from heretic_kl.scoring.paired import LOOKS, Standing, look_is_due, worse_than
from heretic_kl.scoring.scorer import Bounds, PerPrompt, Role, Score

PER_PROMPT: Final = "per_prompt"
"""Key of a score's details: its values, one a prompt, which candidates are raced by."""


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

    @property
    def scores(self) -> Mapping[str, Score]:
        """By scorer; read only where there is an error rate."""
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
    error: float = 0.0
    """Most of the chance that the trial does not beat it after all; 0: surely, by exact bounds."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for storage."""
        best = [value if value > -float("inf") else None for value in self.at_best]
        return {
            "dominated_by": self.dominated_by,
            "findings": dict(self.findings),
            "at_best": best,
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Stopped:
        """The inverse of `to_dict`."""
        best = (-float("inf") if value is None else float(value) for value in data["at_best"])
        error = float(data.get("error", 0.0))  # studies from before there was one
        return cls(int(data["dominated_by"]), dict(data["findings"]), tuple(best), error)


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

    def per_prompt(self, results: Sequence[SoFar]) -> PerPrompt | None:
        """From some; asked only where there is an error rate."""
        ...


@dataclass
class _Look:
    """The last test of one objective of one candidate."""

    measured: int = 0
    """Prompts that were there."""
    worse: Mapping[int, str] = field(default_factory=dict)
    """Numbers of the rivals that it is worse than, with how much, in words."""


class Race:
    """Watches candidates, and ends those that a rival beats.

    Args:
        judges: the objectives, in order.
        places: where each judge's results stand among all.
        rivals: finished trials, the front of them is enough.
        error_rate: most of the chance, per candidate, that one is ended for a rival that does not
            beat it; 0: exact bounds only.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        places: Mapping[str, slice],
        rivals: Sequence[Rival],
        error_rate: float = 0.0,
    ) -> None:
        self._judges = tuple(enumerate(judges))
        self._places = places
        self._rivals = rivals
        self._error_rate = error_rate
        self._looks: dict[tuple[int, int], _Look] = {}
        self.stopped: dict[int, Stopped] = {}

    def __call__(self, candidate: int, results: Sequence[SoFar]) -> bool:
        """Whether the candidate need not go on; see `heretic_kl.requests.Watch`."""
        parts = {place: results[self._places[judge.name]] for place, judge in self._judges}
        # What costs least to know first: most candidates have no rival left after that.
        order = sorted(self._judges, key=lambda entry: _cost(parts[entry[0]]))
        open_places = [place for place, _ in order if _is_open(parts[place])]
        known: dict[int, Bounds] = {}
        looks: dict[int, _Look] = {}
        left = self._rivals
        for place, judge in order:
            if self._error_rate and not looks and place in open_places:
                # All of them now: when to look must not depend on what one of them shows.
                looks = {
                    p: self._look(candidate, p, parts[p], left, open_places) for p in open_places
                }
            known[place] = _bounds(judge, parts[place])
            best, worse = _best(judge, known[place]), looks.get(place, _Look()).worse
            left = [r for r in left if r.objectives[place] <= best or r.number in worse]
            if not left:
                return False
        stopped = self._verdict(left, known, looks)
        if stopped is not None:
            self.stopped[candidate] = stopped
        return stopped is not None

    def _verdict(
        self, left: Sequence[Rival], known: Mapping[int, Bounds], looks: Mapping[int, _Look]
    ) -> Stopped | None:
        """Beaten by one of those that nothing speaks for being better than, unless all tie."""
        best = tuple(_best(judge, known[place]) for place, judge in self._judges)
        rival = next((rival for rival in left if _beats(rival.objectives, best)), None)
        tested: dict[int, str] = {}
        if rival is None:
            found = (r for r in left if any(r.number in look.worse for look in looks.values()))
            rival = next(found, None)
            if rival is None:
                return None
            number = rival.number
            tested = {p: look.worse[number] for p, look in looks.items() if number in look.worse}
        texts = {judge.name: tested.get(p, known[p].text) for p, judge in self._judges}
        findings = {name: text for name, text in texts.items() if text}
        return Stopped(rival.number, findings, best, self._error_rate if tested else 0.0)

    def _look(
        self,
        candidate: int,
        place: int,
        own: Sequence[SoFar],
        rivals: Sequence[Rival],
        open_places: Sequence[int],
    ) -> _Look:
        """The last test of this objective; a new one where it is due."""
        last = self._looks.get((candidate, place), _Look())
        judge = self._judges[place][1]
        found = judge.per_prompt(own)
        if found is None or not look_is_due(len(found.prompts), found.total, last.measured):
            return last
        tested = _foremost([r for r in rivals if _values(r, judge, found)], open_places)
        worse = {}
        for rival in tested:
            objective = rival.objectives[place] * (-1 if judge.role == "maximize" else 1)
            standing = Standing(objective, _values(rival, judge, found))
            much = worse_than(found, standing, maximize=judge.role == "maximize")
            if much.tail <= self._error_rate / (LOOKS * len(tested)):
                worse[rival.number] = (
                    f"worse by {much.mean:.2g} ± {much.standard_error:.1g} on "
                    f"{len(found.prompts)} of {found.total} prompts (error rate "
                    f"{self._error_rate:g})"
                )
        look = self._looks[candidate, place] = _Look(len(found.prompts), worse)
        return look


_PARTS = (PartialRows, PartialResponses)


def _is_whole(own: Sequence[SoFar]) -> bool:
    return all(result is not None and not isinstance(result, _PARTS) for result in own)


def _is_open(own: Sequence[SoFar]) -> bool:
    """Whether an objective is measured in part: its bounds depend on which prompts came first."""
    return not _is_whole(own) and any(result is not None for result in own)


def _cost(own: Sequence[SoFar]) -> int:
    """What to ask first: scores are kept, bounds of nothing are constants, parts are worked on."""
    if not _is_open(own):
        return 0 if _is_whole(own) else 1
    return 3 if any(isinstance(result, PartialRows) for result in own) else 2


def _bounds(judge: Judge, own: Sequence[SoFar]) -> Bounds:
    whole = [r for r in own if r is not None and not isinstance(r, _PARTS)]
    if len(whole) < len(own):
        return judge.bounds(own)
    value = judge.score(whole)
    assert value.optimized is not None  # an objective without a value raises
    return Bounds(value.optimized, value.optimized, value.text)


def _best(judge: Judge, bounds: Bounds) -> float:
    """The best an objective can still be; smaller is better."""
    return bounds.low if judge.role == "minimize" else -bounds.high


def _values(rival: Rival, judge: Judge, found: PerPrompt) -> tuple[float, ...]:
    """What the rival has on each prompt; nothing where it was not kept or does not fit."""
    score = rival.scores.get(judge.name)
    values = () if score is None else score.details.get(PER_PROMPT, ())
    return tuple(values) if len(values) == found.total else ()


def _foremost(rivals: Sequence[Rival], places: Sequence[int]) -> list[Rival]:
    """Those that no other is as good as in all of these objectives, of equals the first.

    A candidate that is worse than any rival in them is worse than one of these.
    """
    ordered = sorted(rivals, key=lambda rival: [rival.objectives[place] for place in places])
    kept: list[Rival] = []
    for rival in ordered:
        own = [rival.objectives[place] for place in places]
        if not any(
            all(r.objectives[p] <= a for p, a in zip(places, own, strict=True)) for r in kept
        ):
            kept.append(rival)
    return kept


def _beats(rival: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the rival is no worse anywhere and better somewhere, even at the candidate's best."""
    pairs = list(zip(rival, best, strict=True))
    # Of equals the one measured better stands: it takes a finished measurement to know.
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
