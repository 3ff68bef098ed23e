"""Whether a layer only passes its residual stream on. Knows nothing about modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
LOW_PRECISION_TOLERANCE = 3e-2
SMALLEST = 1e-3
"""A layer that gives less than this share of its input does not pass it on."""


def passes_through(
    before: Tensor,  # (B, T, streams, D) what enters a layer
    after: Tensor,  # (B, T, streams, D) what it gives though it writes nothing
    others: Sequence[Tensor] = (),  # (B, T, n, D) what else it has of the stream's width
    *,
    dtype: torch.dtype,
) -> bool:
    """Whether a layer that writes nothing gave its input on.

    As it is; scaled; several streams (or what else it was given, or its norms made) mixed, all
    channels alike; or normalized, every channel by its own gain and every token by its own scale.
    """
    if torch.equal(after, before):
        return True
    tolerance = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
    target, source = after.float(), before.float()
    if not bool(torch.isfinite(target).all()):
        return False
    if not bool(target.norm() > SMALLEST * source.norm()):
        return False  # what was silenced holds the stream itself
    fitting = [other.float() for other in others if other.shape[:2] == target.shape[:2]]
    return (
        _mixed(source, target, tolerance)
        or _normalized(source, target, tolerance)
        or bool(fitting and _mixed(torch.cat([source, *fitting], dim=2), target, tolerance))
    )


def _mixed(sources: Tensor, target: Tensor, tolerance: float) -> bool:
    """Whether each target is a combination of the sources (B, T, streams, D) of its token."""
    if sources.shape[2] >= sources.shape[3] // 2:
        return False  # too many to tell anything
    columns = sources.double().transpose(-1, -2)
    fitted = columns @ (torch.linalg.pinv(columns) @ target.double().transpose(-1, -2))
    missed = (fitted.transpose(-1, -2) - target).norm()
    return bool(missed <= tolerance * target.norm())


def _normalized(before: Tensor, target: Tensor, tolerance: float) -> bool:
    """Whether target is before times a gain of the channel times a scale of the token."""
    if before.shape != target.shape or before.shape[2] != 1:
        return False
    ratio = (target / before).double().reshape(-1, before.shape[-1])
    if not bool(torch.isfinite(ratio).all()):
        return False
    values = torch.linalg.svdvals(ratio)
    return bool(values[1] <= 10 * tolerance * values[0])
