"""Runs a model under a plan, without touching a weight. Knows nothing about how plans are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from heretic_kl.ablation import SiteKey
from heretic_kl.model.sites.architecture import Architecture, Site
from heretic_kl.model.sites.stack import stream_out_of, with_stream_out
from heretic_kl.model.sites.writing_tensors import without


class OutputEdit(Protocol):
    """What edits a site's outputs: an `Operator`, or one whose numbers are learned."""

    def __call__(self, output: Tensor) -> Tensor:
        """The edited output (..., D)."""
        ...

    def to(self, device: torch.device) -> OutputEdit:
        """The same on another device."""
        ...


@contextmanager
def edited(architecture: Architecture, plan: Mapping[SiteKey, OutputEdit]) -> Iterator[None]:
    """Apply a plan's operators to the outputs of their sites until the block is left.

    Leaving the block, also by an exception, leaves the model bit for bit as it was.

    Raises:
        KeyError: the plan names a site that the model does not have.
    """
    with ExitStack() as handles:
        for key, operator in plan.items():
            site = architecture.site(key)
            hook = _output_hook(site, operator.to(site.device))
            handles.enter_context(site.module.register_forward_hook(hook, with_kwargs=True))
        yield


def _output_hook(site: Site, operator: OutputEdit) -> Callable[[nn.Module, Any, Any, Any], Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        stream, rest = stream_out_of(output), passed_on(site, args, kwargs)
        if rest is None:
            return with_stream_out(output, operator(stream))
        return with_stream_out(output, operator(stream - rest) + rest)

    return hook


def passed_on(site: Site, args: Any, kwargs: Any) -> Tensor | None:
    """What a site gives beside what its weights write; None: nothing.

    An edit leaves it alone, as one that is baked into the weights does.
    """
    if site.quantized_inputs or all(tensor.alone for tensor in site.tensors):
        return None
    with without(site.module, site.tensors):
        return stream_out_of(site.module.forward(*args, **kwargs))


LayerOutputHook = Callable[[int, Tensor], Tensor | None]
"""(layer index, hidden (B, T, D)) -> None to observe, or the hidden state to go on with."""


@contextmanager
def on_layer_outputs(layers: Sequence[nn.Module], visit: LayerOutputHook) -> Iterator[None]:
    """Call `visit` with the residual stream after each of the layers until the block is left."""
    with ExitStack() as handles:
        for index, layer in enumerate(layers):
            handles.enter_context(layer.register_forward_hook(_layer_hook(index, visit)))
        yield


def _layer_hook(index: int, visit: LayerOutputHook) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        replaced = visit(index, stream_out_of(output))
        return None if replaced is None else with_stream_out(output, replaced)

    return hook
