"""Two candidates measured on the same prompts, prompt by prompt. Runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from heretic_kl.kl import mean_estimate
from heretic_kl.scoring.scorer import Score


@dataclass(frozen=True)
class PairedDifference:
    """The mean over prompts of one candidate's value minus another's, in the scorer's unit."""

    mean: float
    standard_error: float | None
    """None for one prompt."""
    interval: tuple[float, float] | None
    """95%, percentile bootstrap over prompts."""
    prompts: int

    @property
    def distinguishable(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def paired_difference(values: Sequence[float], others: Sequence[float]) -> PairedDifference:
    """How values differ from others on the same prompts, in the same order.

    Raises:
        ValueError: they are not as many, or none.
    """
    if len(values) != len(others) or not values:
        raise ValueError(f"{len(values)} values and {len(others)} others are no pairs")
    difference = torch.tensor(values, dtype=torch.float64) - torch.tensor(
        others, dtype=torch.float64
    )
    return PairedDifference(*mean_estimate(difference), prompts=len(values))


def paired_scores(score: Score, other: Score) -> PairedDifference | None:
    """How a score differs from another one of the same scorer, prompt by prompt.

    None where one of them has no value for each prompt, or they were measured on others.
    """
    values, others = score.per_prompt, other.per_prompt
    if not values or not others or len(values) != len(others):
        return None
    return paired_difference(values, others)


def intervals_overlap(score: Score, other: Score) -> bool:
    """Whether both have a 95% interval and these share a value."""
    if score.interval is None or other.interval is None:
        return False
    return score.interval[0] <= other.interval[1] and other.interval[0] <= score.interval[1]


def alike(score: Score, other: Score) -> bool:
    """Whether two scores of one scorer cannot be told apart on their prompts.

    Their intervals overlap, and unless they are shares of counted responses their difference paired
    by prompt does not exclude 0. Scores that say too little to decide that are not called alike.
    """
    if not intervals_overlap(score, other):
        return False
    if isinstance(score.details.get("count"), int):
        return True
    pair = paired_scores(score, other)
    return pair is not None and not pair.distinguishable
