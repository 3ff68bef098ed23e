"""A model whose linear layers read packed weights. Changes no parameter; knows no edits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from heretic_kl.kl.packing import PACKED_DTYPES, PackedWeight, packed
from heretic_kl.model.causal_model import CausalModel

M = TypeVar("M", bound=CausalModel)


def packed_bytes(lm: CausalModel) -> int:
    """Memory that packed copies of the layers' and the head's weights take; 0: no layout here."""
    if packed(torch.ones(8, 8, dtype=lm.dtype)) is None or lm.device.type != "cpu":
        return 0
    weights = [*(module.weight for module in _linear_layers(lm)), lm.head.weight]
    return sum(weight.nbytes for weight in weights)


def with_packed_weights(lm: M) -> M:
    """The model, its linear layers and its head reading packed copies of their weights from now on.

    A layer whose weight is replaced or written to goes back to reading the weight itself, and so
    do the layers of a deep copy of the model.
    """
    for module in _linear_layers(lm):
        packed_weight = packed(module.weight)
        if packed_weight is not None:
            vars(module)["forward"] = _PackedForward(module, packed_weight)
    return replace(lm, head=lm.head.with_packed_weight())


@contextmanager
def packing_weights(lm: M, wanted: bool) -> Iterator[M]:
    """The model as `with_packed_weights` makes it, if that is wanted, until the block is left."""
    plain = [layer for layer in _linear_layers(lm) if wanted and "forward" not in vars(layer)]
    try:
        yield with_packed_weights(lm) if wanted else lm
    finally:
        for layer in plain:
            vars(layer).pop("forward", None)


@dataclass(eq=False)
class _PackedForward:
    """The forward pass of one linear layer; a deep copy belongs to the copied layer."""

    module: nn.Linear
    packed_weight: PackedWeight

    def __call__(self, rows: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if rows.dtype != weight.dtype or rows.requires_grad:  # the packed product has no gradient
            return nn.functional.linear(rows, weight, bias)
        return self.packed_weight.product(rows, weight, bias)


def _linear_layers(lm: CausalModel) -> list[nn.Linear]:
    """Linear layers whose forward pass is that of their class, or ours.

    Other libraries put their hooks there too.
    """
    head = lm.model.get_output_embeddings()
    return [
        module
        for module in lm.model.modules()
        if type(module) is nn.Linear
        and module is not head  # `lm.head` stands for it
        and module.weight.dtype in PACKED_DTYPES
        and isinstance(vars(module).get("forward"), _PackedForward | None)
    ]
