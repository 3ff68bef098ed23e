"""Matrix products with weights laid out beforehand as the CPU's kernels read them.

A product of few rows spends most of its time on reading the weight, and each call of the plain
one lays it out again. In bfloat16 the result is the same to the last bit; in float32 the kernels
are other ones, and it differs by rounding. Knows nothing about models.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

TOLERANCE: Final = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Largest relative difference from the plain product; rounding gives a tenth of it at most."""

PACKED_DTYPES: Final = tuple(TOLERANCE)


def packed(weight: Tensor) -> Tensor | None:
    """The weight (V, D) laid out for `product`; None: this machine or dtype has no such layout.

    A copy: it takes as much memory as the weight, and does not follow changes of it.
    """
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES:
        return None
    # What torch.compile emits for a frozen linear layer; a release may take it away.
    try:
        laid_out: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        probe = torch.ones(2, weight.shape[1], dtype=weight.dtype)
        ours, plain = product(probe, laid_out).float(), (probe @ weight.T).float()
    except (AttributeError, RuntimeError):
        return None
    apart = float((ours - plain).norm() / plain.norm().clamp_min(1e-30))
    return laid_out if apart < TOLERANCE[weight.dtype] else None


def product(
    rows: Tensor,  # (..., D) of the weight's dtype
    weight: Tensor,  # (V, D) packed
    bias: Tensor | None = None,  # (V,)
) -> Tensor:
    """`rows @ weight.T + bias`, (..., V)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found
