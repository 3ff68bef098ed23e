"""Scores on axes: what damage is, which way is better, what stands for a score that is predicted.

Draws nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from heretic_kl.report.wording import label
from heretic_kl.scoring import Score
from heretic_kl.search import TrialRecord

NATS: Final = " (nats)"
PREDICTED: Final = "predicted"
"""In the details of what stands for a score: nothing was counted."""


@dataclass(frozen=True)
class Plane:
    """Two objectives against each other: the damage on x, another one on y."""

    x: str
    y: str
    titles: tuple[str, str]
    """Of x and of y, with units."""
    roles: tuple[str, str]
    """Of x and of y: minimize or maximize."""
    number: int
    """From 1."""
    planes: int
    """So many show the same trials."""

    @property
    def better(self) -> str:
        """The corner where the best trials are: `lower left`."""
        x, y = self.roles
        up, right = y == "maximize", x == "maximize"
        return f"{'upper' if up else 'lower'} {'right' if right else 'left'}"

    def name(self, stem: str) -> str:
        """Of a figure: `front`, `front-2`."""
        return stem if self.number == 1 else f"{stem}-{self.number}"

    def title(self, stem: str) -> str:
        """Of a figure; names y where other figures have another one."""
        return stem if self.planes == 1 else f"{stem}: {label(self.y)}"


def objective_titles(roles: Mapping[str, str], *measured: Mapping[str, Score]) -> dict[str, str]:
    """Titles of objectives, with units as far as any of the measured scores shows them."""
    return {
        name: next((axis_title(name, s[name]) for s in measured if name in s), label(name))
        for name in roles
    }


def planes_of(roles: Mapping[str, str], titles: Mapping[str, str]) -> tuple[Plane, ...]:
    """Every other objective against the damage: the first one in nats, else the last one.

    Nothing for fewer than two objectives.
    """
    names = list(roles)
    x = next((name for name in names if titles[name].endswith(NATS)), names[-1])
    others = [name for name in names if name != x]
    return tuple(
        Plane(x, y, (titles[x], titles[y]), (roles[x], roles[y]), number, len(others))
        for number, y in enumerate(others, start=1)
    )


def value_of(record: TrialRecord, name: str) -> Score | None:
    """A trial's score, or what rung 1 predicts where nothing was counted: `12% predicted`."""
    if name not in record.scores and name in record.predicted:
        share = record.predicted[name]
        return Score(share, f"{share:.0%} predicted", details={PREDICTED: True})
    return record.scores.get(name)


def is_predicted(score: Score) -> bool:
    """Whether it stands for a score: see `value_of`."""
    return bool(score.details.get(PREDICTED))


def with_interval(name: str, score: Score) -> dict[str, Any]:
    """A score's value and its interval, as fields whose names begin with `name`.

    What is predicted has no interval.
    """
    low, high = score.interval or (score.value, score.value)
    if is_predicted(score):
        low = high = None
    return {name: score.value, f"{name}_low": low, f"{name}_high": high}


def axis_title(name: str, score: Score) -> str:
    """A score's label with its unit: `KL (nats)`, `refusals (share)`."""
    if isinstance(score.details.get("count"), int) and bool(score.details.get("total")):
        return f"{label(name)} (share)"
    return f"{label(name)}{NATS}" if re.search(r"\bnats\b", score.text) else label(name)
