"""The front of trials and rules to pick one of them. Knows nothing about Optuna or models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from heretic_kl.errors import NoTrialError, SelectionError
from heretic_kl.scoring import alike, intervals_overlap, likely_value
from heretic_kl.search.records import TrialRecord


def pareto_front(trials: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Complete trials that no other trial beats in one objective without losing in another.

    Of trials with equal objectives the first stands for all. Sorted by the first objective,
    smallest first.
    """
    complete = sorted(
        (trial for trial in trials if trial.state == "complete"),
        # Below a KL target objectives tie; what was measured decides then.
        key=lambda trial: (trial.objectives, _measured(trial), trial.number),
    )
    front: list[TrialRecord] = []
    for trial in complete:
        if not any(_at_least_as_good(member.objectives, trial.objectives) for member in front):
            front.append(trial)
    return tuple(front)


def alike_behind(
    front: Sequence[TrialRecord], trials: Sequence[TrialRecord]
) -> dict[int, tuple[int, ...]]:
    """Numbers of complete trials off the front by the number of a front's trial they are like.

    Every score of the two is `alike`. Trials of the front that are like none are left out.
    """
    members = {member.number for member in front}
    behind = [t for t in trials if t.state == "complete" and t.number not in members]
    like = {
        member.number: tuple(t.number for t in behind if _are_alike(member, t)) for member in front
    }
    return {number: numbers for number, numbers in like.items() if numbers}


def knee(front: Sequence[TrialRecord]) -> TrialRecord:
    """The trial nearest to the ideal point once every objective spans 0 to 1 over the front.

    Raises:
        NoTrialError: the front is empty.
    """
    if not front:
        raise NoTrialError("no finished trial to pick from")
    columns = list(zip(*(trial.objectives for trial in front), strict=True))
    lows = [min(column) for column in columns]
    spans = [max(column) - min(column) for column in columns]

    def distance(trial: TrialRecord) -> float:
        parts = zip(trial.objectives, lows, spans, strict=True)
        return math.hypot(*((value - low) / span for value, low, span in parts if span > 0))

    return min(front, key=lambda trial: (distance(trial), trial.number))


def notable_trials(front: Sequence[TrialRecord], target: str | None) -> dict[int, str]:
    """The trials of a front to look at first, by number; the one to begin with comes first.

    Args:
        front: not empty.
        target: a rule of `pick`; the trial that it names stands before the knee. None: no rule.

    Returns:
        What each of them is, for people: `at the target`, `knee` or both.
    """
    marks: dict[int, str] = {}
    try:
        marks |= {} if target is None else {pick(target, front, front).number: "at the target"}
    except NoTrialError:  # none meets it
        pass
    middle = knee(front).number
    return marks | {middle: f"{marks[middle]}, knee" if middle in marks else "knee"}


def spread(front: Sequence[TrialRecord], count: int) -> tuple[TrialRecord, ...]:
    """At most `count` trials of a front, spread over it, its ends included."""
    if count >= len(front):
        return tuple(front)
    if count < 2:
        return tuple(front[:count])
    step = (len(front) - 1) / (count - 1)
    return tuple(front[round(index * step)] for index in range(count))


def pick(rule: str, front: Sequence[TrialRecord], trials: Sequence[TrialRecord]) -> TrialRecord:
    """The trial that a rule names.

    Args:
        rule: `knee`; `trial=NUMBER`; or limits with commas between them, `max-SCORER=VALUE` and
            `min-SCORER=VALUE` (for instance `max-refusals=0.05`): of the front's trials that meet
            them all, the one with the least of the other objectives, in their order.
            `likely-SCORER=VALUE` is `max` with a one-sided confidence of 80%, by the score's
            interval; where no trial has that, of those whose value is low enough the likeliest.
        front: the Pareto front.
        trials: all trials.

    Raises:
        SelectionError: the rule is unknown.
        NoTrialError: no trial satisfies it.
    """
    name, _, value = rule.partition("=")
    if name == "knee" and not value:
        return knee(front)
    if name == "trial":
        return _by_number(value, trials)
    limits = _limits(rule)
    by_value = [limit._replace(likely=False) for limit in limits]
    if by_value == [*limits] or any(_meets(trial, limits) for trial in front):
        return _within(limits, front)
    least = _within(by_value, front)
    met = (trial for trial in front if _meets(trial, by_value))
    return min(met, key=lambda trial: ([lim.excess(trial) for lim in limits], trial is not least))


def check_rule(rule: str, objectives: Sequence[str]) -> None:
    """Refuse a rule of `pick` that could never be met, before a long search rather than after it.

    Raises:
        SelectionError: the rule is unknown, names no objective, or its value is not a number.
    """
    name, _, value = rule.partition("=")
    if name == "trial" and not value.isdigit():
        raise SelectionError(f"pick rule {rule!r}: {value!r} is not a trial number")
    if name == "trial" or rule == "knee":
        return
    for limit in _limits(rule):
        if limit.scorer not in objectives:
            raise SelectionError(
                f"pick rule {rule!r}: no objective {limit.scorer!r}; there are "
                f"{', '.join(objectives)}"
            )


def meeting(rule: str, trials: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """The trials that meet all limits of a rule of `pick`, in their order.

    Raises:
        SelectionError: the rule holds something else than limits, or names no score of theirs.
    """
    if rule == "knee" or rule.startswith("trial="):
        raise SelectionError(f"{rule!r} is no limit: use for instance max-refusals=0.05")
    limits = _limits(rule)
    return tuple(trial for trial in trials if _meets(trial, limits))


def by_score(
    name: str, trials: Sequence[TrialRecord], roles: Mapping[str, str]
) -> tuple[TrialRecord, ...]:
    """Trials with the best value of a score first: the largest if its role is to be maximized.

    Trials without a value come last; those with equal values stay in their order.

    Raises:
        SelectionError: no trial has such a score.
    """
    names = dict.fromkeys(key for trial in trials for key in trial.scores)
    if trials and name not in names:
        raise SelectionError(f"no score {name!r}; there are {', '.join(names)}")
    sign = -1.0 if roles.get(name) == "maximize" else 1.0

    def badness(trial: TrialRecord) -> float:
        value = trial.scores[name].value if name in trial.scores else None
        return math.inf if value is None else sign * value

    return tuple(sorted(trials, key=badness))


class _Limit(NamedTuple):
    """A bound on one score."""

    scorer: str
    value: float
    sign: int
    """1: at most the value; -1: at least."""
    likely: bool = False
    """Whether the interval counts."""

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.scorer} {'at most' if self.sign > 0 else 'at least'} {self.value:g}"

    def excess(self, trial: TrialRecord) -> float:
        """By how much a trial misses it; 0 where it does not."""
        if self.scorer not in trial.scores:
            listed = ", ".join(trial.scores)
            raise SelectionError(f"no score {self.scorer!r}; there are {listed}")
        score = trial.scores[self.scorer]
        value = likely_value(score) if self.likely else score.value
        return math.inf if value is None else max(0.0, self.sign * (value - self.value))


def _limits(rule: str) -> tuple[_Limit, ...]:
    limits = []
    for part in rule.split(","):
        name, _, value = part.strip().partition("=")
        bound, dash, scorer = name.partition("-")
        if bound not in ("max", "min", "likely") or not dash:
            raise SelectionError(
                f"unknown pick rule {rule!r}: use knee, trial=NUMBER, max-SCORER=VALUE, "
                "likely-SCORER=VALUE or min-SCORER=VALUE (for instance max-refusals=0.05)"
            )
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise SelectionError(f"pick rule {rule!r}: {value!r} is not a number")
        limits.append(_Limit(scorer, number, -1 if bound == "min" else 1, bound == "likely"))
    return tuple(limits)


def _are_alike(member: TrialRecord, other: TrialRecord) -> bool:
    pairs = [(s, other.scores[name]) for name, s in member.scores.items() if name in other.scores]
    if not pairs or len(pairs) != len(member.scores):
        return False
    # The cheap question first: of most pairs it leaves nothing to ask.
    return all(intervals_overlap(*pair) for pair in pairs) and all(alike(*pair) for pair in pairs)


def _measured(trial: TrialRecord) -> tuple[float, ...]:
    """Values in the order of the objectives, smaller is better; objectives where there are none."""
    values = tuple(score.value for score in trial.scores.values())
    if len(values) != len(trial.objectives):
        return trial.objectives
    return tuple(
        objective if value is None else (value if value * objective >= 0 else -value)
        for value, objective in zip(values, trial.objectives, strict=True)
    )


def _by_number(value: str, trials: Sequence[TrialRecord]) -> TrialRecord:
    states = {str(trial.number): trial.state for trial in trials}
    complete = [trial for trial in trials if trial.state == "complete"]
    for trial in complete:
        if str(trial.number) == value:
            return trial
    numbers = ", ".join(str(trial.number) for trial in complete[:8])
    more = ", ..." if len(complete) > 8 else ""
    instead = f" (its state is {states[value]})" if value in states else ""
    raise NoTrialError(f"no finished trial {value!r}{instead}; there are {numbers or 'none'}{more}")


def _within(limits: Sequence[_Limit], front: Sequence[TrialRecord]) -> TrialRecord:
    if not front:
        raise NoTrialError("no finished trial to pick from")
    nearest = min(front, key=lambda trial: (sum(lim.excess(trial) for lim in limits), trial.number))
    if any(limit.excess(nearest) for limit in limits):
        wanted = " and ".join(limit.text for limit in limits)
        values = " and ".join(_value(nearest, limit.scorer) for limit in limits)
        raise NoTrialError(
            f"no trial has {wanted}; the nearest is trial {nearest.number} with {values}",
            nearest.number,
        )
    names = list(front[0].scores)
    limited = {names.index(limit.scorer) for limit in limits}
    return min(
        (trial for trial in front if _meets(trial, limits)),
        key=lambda trial: (
            *(v for index, v in enumerate(trial.objectives) if index not in limited),
            trial.number,
        ),
    )


def _meets(trial: TrialRecord, limits: Sequence[_Limit]) -> bool:
    return not any(limit.excess(trial) for limit in limits)


def _value(trial: TrialRecord, scorer: str) -> str:
    value = trial.scores[scorer].value
    return f"{scorer} {'unknown' if value is None else f'{value:g}'}"


def _at_least_as_good(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(first, second, strict=True))
