"""Which direction to remove: differences of mean residuals. Knows nothing about prompts or models.

Layer `l` of every tensor here is the residual stream *after* layer `l`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Means that differ by less than this share of their length coincide."""


class ResidualMean:
    """A streaming mean of residuals (L, D), accumulated in float64.

    Args:
        winsorize_quantile: before adding a residual, limit the magnitude of its components to
            this quantile of its own magnitudes, layer by layer; 1.0 leaves it as it is. A few
            massive components otherwise decide the mean.

    Raises:
        ValueError: the quantile is outside (0, 1].
    """

    def __init__(self, winsorize_quantile: float = 1.0) -> None:
        if not 0 < winsorize_quantile <= 1:
            raise ValueError(f"winsorize_quantile must be in (0, 1], got {winsorize_quantile}")
        self._quantile = winsorize_quantile
        self._sum: Tensor | None = None
        self.count = 0

    def add(self, residuals: Tensor) -> None:
        """Add one batch of residuals, (B, L, D)."""
        values = residuals.double()
        if self._quantile < 1:
            values = winsorize(values, self._quantile)
        total = values.sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total
        self.count += int(residuals.shape[0])

    @property
    def mean(self) -> Tensor:
        """(L, D) float64.

        Raises:
            ValueError: nothing was added.
        """
        if self._sum is None or self.count == 0:
            raise ValueError("no residuals were added")
        return self._sum / self.count


def winsorize(
    values: Tensor,  # (..., D)
    quantile: float,  # in (0, 1]
) -> Tensor:
    """Components limited in magnitude to a quantile of the magnitudes of their own vector."""
    magnitudes = values.abs()
    rank = max(1, math.ceil(quantile * values.shape[-1]))
    limit = magnitudes.kthvalue(rank, dim=-1, keepdim=True).values
    return values.clamp(-limit, limit)


@dataclass(frozen=True)
class Directions:
    """A candidate direction for every layer."""

    per_layer: Tensor
    """(L, D) float32, unit length."""

    @property
    def layers(self) -> int:
        """L."""
        return int(self.per_layer.shape[0])

    def at(self, position: float) -> Tensor:
        """The unit direction (D,) at a fractional layer, interpolated between its neighbours.

        Raises:
            ValueError: the position is outside 0 to L - 1.
        """
        if not 0 <= position <= self.layers - 1:
            raise ValueError(f"direction position must be in 0..{self.layers - 1}, got {position}")
        below = min(math.floor(position), self.layers - 1)
        above = min(below + 1, self.layers - 1)
        mixed = torch.lerp(self.per_layer[below], self.per_layer[above], position - below)
        unit: Tensor = mixed / mixed.norm()
        return unit


def difference_of_means(
    target_mean: Tensor,  # (L, D) mean residual where the behaviour shows
    baseline_mean: Tensor,  # (L, D) mean residual where it does not
    *,
    project_off_baseline: bool = False,
) -> Directions:
    """Unit directions from the baseline mean to the target mean, one a layer.

    A layer whose means coincide takes the direction of the next layer above that has one, else of
    the last one below. Such layers exist: every prompt ends with the same tokens, and low layers
    may not look back further (a short convolution sees three tokens).

    `project_off_baseline` keeps only what is orthogonal to the baseline mean, so that removing the
    direction leaves the baseline mean itself where it was.

    Raises:
        ValueError: shapes differ, means are not finite, or they coincide in every layer.
    """
    if target_mean.shape != baseline_mean.shape:
        raise ValueError(
            f"means must have one shape, got {tuple(target_mean.shape)} "
            f"and {tuple(baseline_mean.shape)}"
        )
    difference = target_mean.double() - baseline_mean.double()
    if project_off_baseline:
        unit = baseline_mean.double()
        unit = unit / unit.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        difference = difference - (difference * unit).sum(dim=-1, keepdim=True) * unit
    lengths = difference.norm(dim=-1, keepdim=True)
    apart = lengths > ROUNDING * baseline_mean.double().norm(dim=-1, keepdim=True)
    separated = torch.nonzero(apart.squeeze(-1)).flatten()
    if not torch.isfinite(lengths).all() or not len(separated):
        raise ValueError("the two mean residuals give no direction in any layer")
    layers = torch.arange(len(lengths))
    position = torch.searchsorted(separated, layers).clamp_max(len(separated) - 1)
    nearest = separated[position]
    return Directions((difference / lengths)[nearest].float())
