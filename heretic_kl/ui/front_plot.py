"""Trials as a scatter plot of characters: refusals up, damage across. Knows no terminal.

Why not a library: uniplot and plotille set points in Braille, which terminals without Unicode lack,
and plotext is a compiled wheel of half a megabyte. A mark for each kind of point, in ASCII where it
has to be, is what this plot consists of.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from rich.text import Text

from heretic_kl.report import label
from heretic_kl.search import TrialRecord, knee

if TYPE_CHECKING:
    from heretic_kl.scoring import Score

LOG_FROM: Final = 20.0
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""
LINES_BESIDE_POINTS: Final = 3
"""Legend, axis, and its ends."""


class Mark(NamedTuple):
    """How a kind of trial is drawn; later kinds cover earlier ones."""

    unicode: str
    ascii: str
    style: str
    meaning: str


PREDICTED: Final = Mark("∘", ",", "dim", "predicted")
OTHER: Final = Mark("·", ".", "not dim", "other")
FRONT: Final = Mark("●", "o", "not dim bold green", "front")
KNEE: Final = Mark("◆", "@", "not dim bold", "knee")
MARKS: Final = (PREDICTED, OTHER, FRONT, KNEE)


class _Point(NamedTuple):
    x: float
    y: float
    mark: Mark


@dataclass
class FrontPlot:
    """The trials seen so far and the front among them."""

    trials: Mapping[int, TrialRecord] = field(default_factory=dict)
    """By number."""
    front: tuple[TrialRecord, ...] = ()

    def add(self, record: TrialRecord, front: tuple[TrialRecord, ...]) -> None:
        """One more trial, and the front after it."""
        self.front = front
        # Another thread may be drawing: what it reads is replaced, never changed.
        self.trials = {**self.trials, **{trial.number: trial for trial in (*front, record)}}

    def lines(self, width: int, height: int, *, ascii_only: bool = False) -> list[Text]:
        """The plot, `height` lines of at most `width` cells; nothing for fewer than two points."""
        front = self.front
        names = list(front[0].scores)[:2] if front else []
        points = list(_points(self.trials, front, names)) if len(names) == 2 else []
        rows = height - LINES_BESIDE_POINTS
        if len(points) < 2 or rows < 2 or width < 40:
            return []
        up, across = names
        y_axis = _Axis(up, [p.y for p in points], front[0].scores[up], logarithmic=False)
        x_axis = _Axis(across, [p.x for p in points], front[0].scores[across])
        ends = [y_axis.text(y_axis.high), y_axis.text(y_axis.low)]
        margin = max(map(len, ends)) + 1
        columns = width - margin - 1
        grid: dict[tuple[int, int], Mark] = {}
        for point in sorted(points, key=lambda point: MARKS.index(point.mark)):
            place = (
                rows - 1 - round(y_axis.share(point.y) * (rows - 1)),
                round(x_axis.share(point.x) * (columns - 1)),
            )
            grid[place] = point.mark
        bar, corner, dash = ("|", "+", "-") if ascii_only else ("│", "└", "─")
        lines = [_legend(up, x_axis, {point.mark for point in points}, ascii_only)]
        for row in range(rows):
            text = ends[0] if row == 0 else ends[1] if row == rows - 1 else ""
            lines.append(Text(f"{text:>{margin - 1}} {bar}", style="dim"))
            for column in range(columns):
                mark = grid.get((row, column))
                if mark is None:
                    lines[-1].append(" ")
                else:
                    sign = mark.ascii if ascii_only else mark.unicode
                    lines[-1].append(sign, mark.style)
        lines.append(Text(f"{' ' * margin}{corner}{dash * columns}", style="dim"))
        low, high = x_axis.text(x_axis.low), x_axis.text(x_axis.high)
        lines.append(Text(f"{' ' * (margin + 1)}{low}{high:>{columns - len(low)}}", style="dim"))
        for line in lines:
            line.truncate(width)
            line.rstrip()
        return lines


class _Axis:
    """From values to shares of an axis; logarithmic where they differ by orders of magnitude."""

    def __init__(
        self, name: str, values: Sequence[float], score: Score, *, logarithmic: bool = True
    ) -> None:
        self.name = name
        positive = [value for value in values if value > 0]
        self.logarithmic = (
            logarithmic
            and min(values) >= 0
            and len(positive) > 1
            and max(positive) > LOG_FROM * min(positive)
        )
        # Nothing is no place on a logarithmic axis: it stands at the smallest value there is.
        self._as_share = "total" in score.details
        lowest = 0.0 if self._as_share else min(values)
        self.low = min(positive) if self.logarithmic else lowest
        self.high = max(values)

    def share(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.high <= self.low:
            return 0.5
        if self.logarithmic:
            ratio = max(value, self.low) / self.low
            return math.log(ratio) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def text(self, value: float) -> str:
        """A value at an end of the axis."""
        return f"{value:.0%}" if self._as_share else f"{value:.2g}"


def _value(scores: Mapping[str, Score], name: str) -> float | None:
    """A score's value; None where there is none that has a place on an axis."""
    value = scores[name].value if name in scores else None
    return value if value is not None and math.isfinite(value) else None


def _points(
    trials: Mapping[int, TrialRecord], front: Sequence[TrialRecord], names: Sequence[str]
) -> Iterator[_Point]:
    up, across = names
    on_front = {trial.number for trial in front}
    middle = knee(front).number
    for number, trial in trials.items():
        x, y = _value(trial.scores, across), _value(trial.scores, up)
        mark = KNEE if number == middle else FRONT if number in on_front else OTHER
        if y is None and up in trial.predicted:
            y, mark = trial.predicted[up], PREDICTED
        if x is not None and y is not None:
            yield _Point(x, y, mark)


def _legend(up: str, x_axis: _Axis, marks: Iterable[Mark], ascii_only: bool) -> Text:
    scale = " (log)" if x_axis.logarithmic else ""
    line = Text(f"{label(up)} against {label(x_axis.name)}{scale} ", style="dim")
    for mark in sorted(marks, key=MARKS.index, reverse=True):
        line.append(f" {mark.ascii if ascii_only else mark.unicode}", mark.style)
        line.append(f" {mark.meaning}")
    return line
