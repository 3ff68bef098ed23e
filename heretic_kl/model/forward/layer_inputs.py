"""Running layers from what entered them: a pass from the middle on, or a layer once more.

Below the lowest edited layer every candidate computes what the unedited model computed. A backward
pass can compute a layer's activations again instead of keeping them. Knows no plans and no prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.forward.tree_attention import attending_again
from heretic_kl.model.sites.stack import stream_into, with_stream


@contextmanager
def layer_inputs(
    layers: Sequence[nn.Module], boundaries: Sequence[int], keep: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Call `keep(boundary, hidden (B, T, D))` with what enters each boundary's layer."""

    def hook(boundary: int) -> Callable[[nn.Module, Any, Any], None]:
        def observe(_module: nn.Module, args: Any, kwargs: Any) -> None:
            keep(boundary, stream_into(args, kwargs))

        return observe

    with ExitStack() as handles:
        for boundary in boundaries:
            layer = layers[boundary]
            handles.enter_context(layer.register_forward_pre_hook(hook(boundary), with_kwargs=True))
        yield


@contextmanager
def resumed_at(
    layers: Sequence[nn.Module], boundary: int, hidden: Tensor, *, as_tuple: bool
) -> Iterator[None]:
    """Run no layer below the boundary; `hidden` (B, T, D) enters the boundary's layer instead.

    `as_tuple`: layers return their hidden state first in a tuple.
    """
    begun: list[bool] = []

    def skipped(*args: Any, **kwargs: Any) -> Any:
        passed = stream_into(args, kwargs)
        return (passed, None) if as_tuple else passed

    def replace(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if begun:
            raise UnsupportedModelError("the stream passes its layers more than once")
        begun.append(True)
        return with_stream(args, kwargs, hidden)

    with ExitStack() as stack:
        for layer in layers[:boundary]:
            stack.enter_context(forward_replaced(layer, skipped))
        stack.enter_context(layers[boundary].register_forward_pre_hook(replace, with_kwargs=True))
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module calls another function until the block is left.

    An instance may have a function of its own already: other libraries put their hooks there.
    """
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def gradient_checkpointing(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers that run in the block keep their inputs alone, and run again in the backward pass.

    What acts inside them, such as an edit, must be in force in the backward pass too. They must be
    called without a cache, as it would grow twice, and draw nothing at random.
    """
    with ExitStack() as stack:
        for layer in dict.fromkeys(layers):
            checkpointed = partial(
                checkpoint,
                layer.forward,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=partial(attending_again, layer),
            )
            stack.enter_context(forward_replaced(layer, checkpointed))
        yield


@contextmanager
def returns_tuple(layers: Sequence[nn.Module], is_tuple: list[bool]) -> Iterator[None]:
    """Note whether the first layer returns a tuple, while a forward pass runs in the block."""

    def observe(_module: nn.Module, _inputs: Any, output: Any) -> None:
        is_tuple.append(isinstance(output, tuple))

    with layers[0].register_forward_hook(observe):
        yield
