"""Runs a model under a plan, without touching a weight. Knows nothing about how plans are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heretic_kl.ablation import Operator, Plan
from heretic_kl.model.architecture import Architecture
from heretic_kl.model.stack import stream_out_of, with_stream_out


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
            placed = operator.to(site.device)
            handles.append(site.module.register_forward_hook(_output_hook(placed)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(operator: Operator) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return with_stream_out(output, operator(stream_out_of(output)))

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
        replaced = visit(index, stream_out_of(output))
        return None if replaced is None else with_stream_out(output, replaced)

    return hook
