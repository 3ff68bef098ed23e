"""Intervals around counts and means. Knows nothing about models or divergences."""

import math
from statistics import NormalDist
from typing import Final, NamedTuple

import torch
from torch import Tensor

_DRAWN_AT_ONCE: Final = 2**21


class Interval(NamedTuple):
    """A two-sided interval, in the unit of what it surrounds."""

    low: float
    high: float


class MeanEstimate(NamedTuple):
    """A mean over prompts with its uncertainty, in the unit of the values."""

    mean: float
    standard_error: float | None
    """None for fewer than two values."""
    interval: Interval | None
    """95%, percentile bootstrap; None for fewer than two values."""

    def text(self, digits: int) -> str:
        """For people: `0.52 ± 0.04`; without an error `0.52`."""
        plus_minus = "" if self.standard_error is None else f" ± {self.standard_error:.{digits}f}"
        return f"{self.mean:.{digits}f}{plus_minus}"


def wilson_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return the Wilson score interval of a share (Wilson 1927).

    Unlike the normal approximation it stays within [0, 1] and is not empty at 0 or n.

    Args:
        successes: How many of the `n` trials count.
        n: Number of trials; with none the interval is (0, 1).
        level: Coverage, between 0 and 1.

    Raises:
        ValueError: `successes` is not in [0, n], or `level` not in (0, 1).
    """
    _require_level(level)
    if n < 0 or not 0 <= successes <= n:
        raise ValueError(f"successes must be in [0, n], got {successes} of {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share = successes / n
    spread = z * math.sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n))
    scale = 1.0 + z * z / n
    centre = share + z * z / (2.0 * n)
    low = 0.0 if successes == 0 else max(0.0, (centre - spread) / scale)
    high = 1.0 if successes == n else min(1.0, (centre + spread) / scale)
    return Interval(low, high)


def standard_error(
    values: Tensor,  # (P,) one value per prompt
) -> float | None:
    """Return the standard error of the mean of `values`; None for fewer than two."""
    if values.numel() < 2:
        return None
    ordered = values.to(torch.float64).sort().values
    return float(ordered.std(correction=1)) / math.sqrt(values.numel())


def mean_estimate(
    values: Tensor,  # (P,) one value per prompt
) -> MeanEstimate:
    """Return the mean of `values` with its standard error and bootstrap interval."""
    values = values.to(torch.float64)
    return MeanEstimate(float(values.mean()), standard_error(values), bootstrap_interval(values))


def bootstrap_interval(
    values: Tensor,  # (P,) one value per prompt
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval | None:
    """Return the percentile bootstrap interval of the mean; None for fewer than two values.

    Values are sorted before they are drawn: their order does not matter.

    Raises:
        ValueError: `draws` is below 1, or `level` not in (0, 1).
    """
    _require_level(level)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    count = values.numel()
    if count < 2:
        return None
    ordered = values.detach().to(device="cpu", dtype=torch.float64).sort().values
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _DRAWN_AT_ONCE // count)
    means = torch.cat(
        [
            ordered[
                torch.randint(count, (min(at_once, draws - start), count), generator=generator)
            ].mean(dim=-1)
            for start in range(0, draws, at_once)
        ]
    )
    means = means.sort().values
    tail = (1.0 - level) / 2.0
    return Interval(sorted_quantile(means, tail), sorted_quantile(means, 1.0 - tail))


def sorted_quantile(
    ordered: Tensor,  # (rows,) ascending, at least one
    level: float,
) -> float:
    """Return a quantile by linear interpolation, as `torch.quantile`, for any number of rows."""
    place = level * (ordered.numel() - 1)
    below = min(int(place), ordered.numel() - 1)
    above = min(below + 1, ordered.numel() - 1)
    low, high = float(ordered[below]), float(ordered[above])
    return low + (high - low) * (place - below)


def _require_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level}")
