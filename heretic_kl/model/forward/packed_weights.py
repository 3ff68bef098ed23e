"""A model whose linear layers read packed weights. Changes no parameter; knows no edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from heretic_kl.kl.packing import PACKED_DTYPES, packed, product
from heretic_kl.model.causal_model import CausalModel

M = TypeVar("M", bound=CausalModel)


def packed_bytes(lm: CausalModel) -> int:
    """What packed copies of all that can be packed would take; 0: nothing can be."""
    weights = [module.weight for module in _linear_layers(lm)]
    if packed(torch.ones(8, 8, dtype=lm.dtype)) is None or lm.device.type != "cpu":
        return 0
    return sum(w.numel() * w.element_size() for w in [*weights, lm.head.weight])


def with_packed_weights(lm: M) -> M:
    """The model, its linear layers and its head reading packed copies of their weights from now on.

    A layer whose weight is replaced or written to goes back to reading the weight itself.
    """
    for module in _linear_layers(lm):
        laid_out = packed(module.weight)
        if laid_out is not None:
            vars(module)["forward"] = _forward(module, laid_out)
    return replace(lm, head=lm.head.with_packed_weight())


def with_plain_weights(lm: CausalModel) -> None:
    """Take packed copies out of the model's layers."""
    for module in _linear_layers(lm):
        vars(module).pop("forward", None)


def _linear_layers(lm: CausalModel) -> list[nn.Linear]:
    head = lm.model.get_output_embeddings()
    return [
        module
        for module in lm.model.modules()
        if type(module) is nn.Linear
        and module is not head  # `lm.head` stands for it
        and module.weight.dtype in PACKED_DTYPES
        and _is_own(vars(module).get("forward"))
    ]


def _is_own(forward: object) -> bool:
    """Whether a layer's forward is that of its class or ours; others hook theirs in there too."""
    return forward is None or hasattr(forward, "packs")


def _forward(module: nn.Linear, laid_out: Tensor) -> Callable[[Tensor], Tensor]:
    place, version = module.weight.data_ptr(), module.weight._version

    def forward(rows: Tensor) -> Tensor:
        weight = module.weight
        changed = weight.data_ptr() != place or weight._version != version
        if changed or rows.dtype != weight.dtype or rows.requires_grad:  # ours has no gradient
            return nn.functional.linear(rows, weight, module.bias)
        return product(rows, laid_out, module.bias)

    forward.packs = True  # type: ignore[attr-defined]
    return forward
