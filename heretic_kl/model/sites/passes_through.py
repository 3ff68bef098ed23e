"""Whether a layer only passes its residual stream through. Knows nothing about modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
LOW_PRECISION_TOLERANCE = 3e-2
SMALLEST = 1e-3
"""A layer whose output is smaller than this share of its input does not pass it through."""


def passes_through(
    before: Tensor,  # (B, T, streams, D) what enters a layer
    after: Tensor,  # (B, T, streams, D) its output while it writes nothing
    others: Sequence[Tensor] = (),  # (B, T, n, D) its other inputs, and what its norms make
    *,
    dtype: torch.dtype,
) -> bool:
    """Whether the output of a layer that writes nothing is a form of its input.

    That is: equal; scaled; several streams and other inputs mixed, all channels alike; or
    normalized, with a gain for every channel and a scale for every token.
    """
    if torch.equal(after, before):
        return True
    tolerance = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
    target, source = after.float(), before.float()
    if not bool(torch.isfinite(target).all()):
        return False
    if not bool(target.norm() > SMALLEST * source.norm()):
        return False  # a zero-ablated module holds the stream itself
    per_token = [other.float() for other in others if other.shape[:2] == target.shape[:2]]
    return (
        _mixed(source, target, tolerance)
        or _normalized(source, target, tolerance)
        or bool(per_token and _mixed(torch.cat([source, *per_token], dim=2), target, tolerance))
    )


def _mixed(sources: Tensor, target: Tensor, tolerance: float) -> bool:
    """Whether each target is a combination of the sources (B, T, streams, D) of its token."""
    if sources.shape[2] >= sources.shape[3] // 2:
        return False  # so many combine to anything
    columns = sources.double().transpose(-1, -2)
    fitted = columns @ (torch.linalg.pinv(columns) @ target.double().transpose(-1, -2))
    error = (fitted.transpose(-1, -2) - target).norm()
    return bool(error <= tolerance * target.norm())


def _normalized(before: Tensor, target: Tensor, tolerance: float) -> bool:
    """Whether target is before times a gain of the channel times a scale of the token."""
    if before.shape != target.shape or before.shape[2] != 1:
        return False
    ratio = (target / before).double().reshape(-1, before.shape[-1])
    if not bool(torch.isfinite(ratio).all()):
        return False
    values = torch.linalg.svdvals(ratio)
    return bool(values[1] <= 10 * tolerance * values[0])
