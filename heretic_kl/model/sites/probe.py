"""Forward passes in which each layer has a fixed input and some modules are zero-ablated.

A zero-ablated module returns zeros. Because every layer gets the input that it has in the
unedited model, one pass examines all layers, independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.placement import device_of
from heretic_kl.model.sites.stack import (
    LayerStack,
    stream_into,
    stream_out_of,
    with_stream,
    with_stream_out,
)

ROWS, TOKENS = 2, 11
"""Size of the probe; odd numbers that no width of a model has."""

PlacedModule: TypeAlias = tuple[int, nn.Module]
"""A module as part of a layer: some modules are part of several."""
OutputHook: TypeAlias = Callable[[Tensor], Tensor | None]
"""A module's output -> its replacement, or None to leave it."""


class LayerCall(NamedTuple):
    """One call of one layer; looped models call a layer several times in a pass."""

    layer: int
    stream_in: Tensor
    """(B, T, D), or with one more dimension where a model has several streams."""
    other_inputs: tuple[Tensor, ...]
    """The layer's other inputs of the stream's width."""


class ModuleCall(NamedTuple):
    """A module inside a layer whose output is D wide."""

    layer: int
    path: str
    """Inside the layer."""
    module: nn.Module


def probe_tokens(model: Any, seed: int = 0) -> Tensor:
    """Random token ids, (ROWS, TOKENS)."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    vocabulary = min(int(embeddings.shape[0]), int(getattr(config, "vocab_size", 1 << 30)))
    # Ids that stand for images and sounds lie at the end of most vocabularies.
    tokens = torch.randint(max(1, vocabulary * 3 // 4), (ROWS, TOKENS), generator=generator)
    return tokens.to(device_of(model.get_input_embeddings()))


class Probe:
    """The model's layers under examination."""

    def __init__(self, model: Any, stack: LayerStack, width: int) -> None:
        self.width = width
        self.stack = stack
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        """Of the weights; the stream may have a higher precision."""
        self._body = model.base_model
        self._tokens = probe_tokens(model)
        self.modules: list[ModuleCall] = []
        """Modules in the order in which their calls begin, each once a layer."""
        self.calls: list[LayerCall] = []
        self._record()

    @property
    def simple_modules(self) -> list[PlacedModule]:
        """Modules that hold no matrix: norms, scales, activations."""
        return [
            (layer, module)
            for layer, _, module in self.modules
            if not any(parameter.ndim >= 2 for parameter in module.parameters())
        ]

    def tokens_first(self, stream: Tensor) -> Tensor:
        """A view (B, T, streams, D) of what layers pass to each other; most models have one stream.

        Raises:
            UnsupportedModelError: it is not laid out by sequences and tokens.
        """
        if stream.ndim == 3 and stream.shape[0] == ROWS and stream.shape[-1] % self.width == 0:
            return stream.reshape(*stream.shape[:2], -1, self.width)
        if stream.ndim == 4 and stream.shape[:2] == (ROWS, TOKENS):
            return stream
        if stream.ndim == 4 and stream.shape[1:3] == (ROWS, TOKENS):
            return stream.movedim(0, 2)
        raise UnsupportedModelError(
            f"layers pass {tuple(stream.shape)} for {ROWS} sequences of {TOKENS} tokens: no "
            f"residual stream {self.width} wide, laid out by sequences and tokens"
        )

    @torch.no_grad()
    def run(
        self,
        ablated: Collection[PlacedModule] = (),
        *,
        inputs: Sequence[Tensor] | None = None,
        hooks: Sequence[tuple[PlacedModule, OutputHook]] = (),
    ) -> list[Tensor]:
        """The output of each layer, in the order of `calls`.

        Args:
            ablated: modules whose output is replaced by zeros.
            inputs: streams that enter the layers; None: those of the unedited model.
            hooks: on outputs of modules, after zero-ablation.
        """
        streams = [call.stream_in for call in self.calls] if inputs is None else inputs
        outputs: list[Tensor] = []
        current_layer = [-1]

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            current_layer[0] = self.calls[len(outputs)].layer
            # A copy: a layer may write into its input.
            return with_stream(args, kwargs, streams[len(outputs)].clone())

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            outputs.append(stream_out_of(output).clone())
            current_layer[0] = -1

        with ExitStack() as handles:
            for (layer, module), hook in [*((s, torch.zeros_like) for s in ablated), *hooks]:
                in_layer = _only_in_layer(current_layer, layer, hook)
                handles.enter_context(module.register_forward_hook(in_layer))
            for module in dict.fromkeys(self.stack.layers):
                handles.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                handles.enter_context(module.register_forward_hook(leave))
            self._body(input_ids=self._tokens, use_cache=False)
        return outputs

    @torch.no_grad()
    def _record(self) -> None:
        """One plain pass."""
        layer_indices: list[int] = []  # of the layers that are running, innermost last
        called: dict[tuple[int, str], nn.Module] = {}
        wide: set[tuple[int, str]] = set()
        second_states: list[object] = []

        def enter_layer(index: int, args: Any, kwargs: Any) -> None:
            layer_indices.append(index)
            if any(
                value is state for value in (*args, *kwargs.values()) for state in second_states
            ):
                raise UnsupportedModelError(
                    "layers pass a second state of the residual stream's width to each other "
                    "(as reversible layers do), which no edit of the first would reach"
                )
            self.calls.append(self._layer_call(index, args, kwargs))

        def leave_layer(output: Any) -> None:
            layer_indices.pop()
            second_states[:] = self._second_states(output)

        def enter_module(path: str, module: nn.Module, _args: Any, _kwargs: Any) -> None:
            if layer_indices:
                called.setdefault((layer_indices[-1], path), module)

        def leave_module(path: str, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if layer_indices and self._is_wide(first):
                wide.add((layer_indices[-1], path))

        with ExitStack() as handles:
            for index, layer in enumerate(self.stack.layers):
                _on_call(handles, layer, partial(enter_layer, index))
                for path, module in layer.named_modules():
                    if module is not layer:
                        _on_call(handles, module, partial(enter_module, path, module))
                        _on_return(handles, module, partial(leave_module, path))
                _on_return(handles, layer, leave_layer)
            self._body(input_ids=self._tokens, use_cache=False)
        self.modules = [
            ModuleCall(*place, module) for place, module in called.items() if place in wide
        ]

    def _layer_call(self, index: int, args: Any, kwargs: Any) -> LayerCall:
        stream = stream_into(args, kwargs)
        others = tuple(
            value.clone()
            for value in (*args, *kwargs.values())
            if value is not stream and self._is_wide(value)
        )
        return LayerCall(index, stream.clone(), others)

    def _second_states(self, output: Any) -> list[Any]:
        """What a layer returns beside the stream that has the stream's shape."""
        if isinstance(output, Tensor):
            return []
        values = list(output.values() if isinstance(output, dict) else output)
        shape = stream_out_of(output).shape
        return [value for value in values if self._is_wide(value) and value.shape == shape][1:]

    def _is_wide(self, value: object) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim >= 2
            and value.shape[-1] == self.width
        )


def _only_in_layer(current_layer: list[int], layer: int, hook: OutputHook) -> Callable[..., Any]:
    """A forward hook that acts inside one layer only: some modules are part of several."""

    def forward_hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if current_layer[0] != layer:
            return None
        replacement = hook(stream_out_of(output))
        return None if replacement is None else with_stream_out(output, replacement)

    return forward_hook


def _on_call(handles: ExitStack, module: nn.Module, callback: Callable[..., None]) -> None:
    """Pass the arguments and keyword arguments of each call to the callback."""

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
        callback(args, kwargs)

    handles.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))


def _on_return(handles: ExitStack, module: nn.Module, callback: Callable[..., None]) -> None:
    """Pass the return value of each call to the callback."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        callback(output)

    handles.enter_context(module.register_forward_hook(hook))
