"""Runs a model under a plan, without touching a weight. Knows nothing about how plans are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Operator, Plan
from heretic_kl.model.architecture import Architecture


@contextmanager
def edited(architecture: Architecture, plan: Plan) -> Iterator[None]:
    """Apply a plan's operators to the outputs of their sites until the block is left.

    Leaving the block, also by an exception, leaves the model bit for bit as it was.

    Raises:
        KeyError: the plan names a site that the model does not have.
    """
    handles: list[torch.utils.hooks.RemovableHandle] = []
    try:
        for key, operator in plan.items():
            site = architecture.site(key)
            placed = operator.to(site.weight().device)
            handles.append(site.module.register_forward_hook(_output_hook(placed)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(operator: Operator) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return operator(output)

    return hook


LayerOutputHook = Callable[[int, Tensor], Tensor | None]
"""(layer index, hidden (B, T, D)) -> None to observe, or the hidden state to go on with."""


@contextmanager
def on_layer_outputs(layers: Sequence[nn.Module], visit: LayerOutputHook) -> Iterator[None]:
    """Call `visit` with the residual stream after each of the layers until the block is left."""
    handles = [
        layer.register_forward_hook(_layer_hook(index, visit)) for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_hook(index: int, visit: LayerOutputHook) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        # Layers return the hidden state alone, or first in a tuple.
        hidden = output[0] if isinstance(output, tuple) else output
        replaced = visit(index, hidden)
        if replaced is None:
            return None
        return (replaced, *output[1:]) if isinstance(output, tuple) else replaced

    return hook
