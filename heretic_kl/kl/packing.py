"""Matrix products with weights packed beforehand into the layout that the CPU's kernels read.

A product of few rows spends most of its time on reading the weight, and each call of the plain
one packs it again. In bfloat16 the result is the same to the last bit; in float32 the kernels
differ, and the results by rounding. Knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

TOLERANCE: Final = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Largest relative difference from the plain product; rounding gives a tenth of it at most."""

PACKED_DTYPES: Final = tuple(TOLERANCE)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed copy of a weight, good for as long as that weight is what it was.

    It takes as much memory as the weight. Copies of it (`copy.deepcopy`, pickle) hold nothing and
    are good for no weight: the product with them is the plain one.
    """

    source: Tensor | None  # (V, D), held so that no other weight can take its place in memory
    layout: Tensor | None
    version: int = 0

    def is_current(self, weight: Tensor) -> bool:
        """Whether `weight` is the one that was packed, and nothing was written to it since."""
        return (
            self.source is not None
            and weight.data_ptr() == self.source.data_ptr()
            and weight.shape == self.source.shape
            and weight._version == self.version
        )

    def product(
        self,
        rows: Tensor,  # (..., D) of the weight's dtype
        weight: Tensor,  # (V, D)
        bias: Tensor | None = None,  # (V,)
    ) -> Tensor:
        """`rows @ weight.T + bias`, (..., V): packed where this is current, else plain."""
        if not self.is_current(weight):
            return nn.functional.linear(rows, weight, bias)
        assert self.layout is not None  # it is current
        return _packed_product(rows, self.layout, bias)

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[None, None]]:
        """Copy nothing: the weight that a copy of the model reads is another one."""
        return PackedWeight, (None, None)


def packed(
    weight: Tensor,  # (V, D)
) -> PackedWeight | None:
    """A packed copy of the weight; None: this machine or dtype has no such layout."""
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES:
        return None
    # What torch.compile emits for a frozen linear layer; a release may take it away.
    try:
        layout: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        rows = torch.ones(2, weight.shape[1], dtype=weight.dtype)
        ours, plain = _packed_product(rows, layout, None).float(), (rows @ weight.T).float()
    except (AttributeError, RuntimeError):
        return None
    difference = float((ours - plain).norm() / plain.norm().clamp_min(1e-30))
    if not difference < TOLERANCE[weight.dtype]:
        return None
    return PackedWeight(weight.detach(), layout, weight._version)


def _packed_product(rows: Tensor, layout: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, layout, bias, "none", [], "")
    return product
