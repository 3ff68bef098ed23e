"""Which trials generate responses. Runs no model.

Rung 1 measures a trial by teacher forcing alone: its KL, and the probability that its responses
open with a refusal. Rung 2 generates responses, for trials that rung 1 finds promising, and for
every eighth one, so that it is known how well rung 1 foretells rung 2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from heretic_kl.scoring import Score

if TYPE_CHECKING:
    from heretic_kl.search.records import TrialRecord

ALWAYS = 2
"""The first trials all generate responses."""
SPOT_CHECK = 8
"""So does every eighth."""
PROMISING = 3.0
"""Of the acceptable share of refusals: rung 1 may be wrong by this factor."""
FEWEST_PAIRS = 8
"""Trials with both figures from which on rung 1 is judged."""
LEAST_CORRELATION = 0.5
"""Rank correlation below which every trial generates responses."""


@dataclass(frozen=True)
class Screened:
    """What came of a trial of a search with two rungs."""

    scores: Mapping[str, Score]
    """Of a promoted trial all objectives, of another one those that need no responses."""
    predicted: Mapping[str, float]
    """What rung 1 says of the objectives that need responses, by scorer."""
    promoted: bool
    """Whether responses were generated."""


class Standing(NamedTuple):
    """A trial as promotion sees it; smaller is better for all."""

    refusals: float  # share, counted where it was, else predicted
    others: tuple[float, ...]  # the other objectives


def promotes(
    number: int, standing: Standing, promoted: Sequence[Standing], *, target: float
) -> bool:
    """Whether a trial generates responses.

    Args:
        number: the trial's, interrupted ones not counted.
        standing: by rung 1.
        promoted: those that did, by rung 2.
        target: share of refusals that is acceptable; below it fewer are no gain.
    """
    if number < ALWAYS or number % SPOT_CHECK == 0:
        return True
    if standing.refusals > PROMISING * target:
        return False
    mine = _key(standing, target)
    rivals = (_key(rival, target) for rival in promoted)
    return not any(all(a <= b for a, b in zip(rival, mine, strict=True)) for rival in rivals)


def _key(standing: Standing, target: float) -> tuple[float, ...]:
    return max(0.0, standing.refusals - target), *standing.others


class RankCorrelation(NamedTuple):
    """Spearman's, with its 95% interval by Fisher's transformation (Bonett and Wright 2000)."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f}, {self.pairs} trials)"


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> RankCorrelation | None:
    """Spearman's rank correlation; None for fewer than 4 pairs or where one side is constant."""
    if len(pairs) < 4:
        return None
    first, second = (_ranks(column) for column in zip(*pairs, strict=True))
    try:
        value = statistics.correlation(first, second)
    except statistics.StatisticsError:
        return None
    error = math.sqrt((1 + value**2 / 2) / (len(pairs) - 3))
    centre = math.atanh(min(max(value, -1 + 1e-9), 1 - 1e-9))
    low, high = (math.tanh(centre + sign * 1.96 * error) for sign in (-1, 1))
    return RankCorrelation(value, low, high, len(pairs))


def foretold(records: Sequence[TrialRecord], name: str) -> RankCorrelation | None:
    """How well rung 1 foretells an objective, over the searched trials that have both figures.

    Refined trials are left out: they were trained to make small what rung 1 predicts.
    """
    pairs = [
        (record.predicted[name], record.scores[name].value)
        for record in records
        if record.state == "complete" and name in record.predicted and not record.refinement
    ]
    return rank_correlation([(first, second) for first, second in pairs if second is not None])


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: index for index, value in reversed(list(enumerate(ordered, start=1)))}
    counts = {value: ordered.count(value) for value in first}
    return [first[value] + (counts[value] - 1) / 2 for value in values]
