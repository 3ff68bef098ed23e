"""Forward passes that tell what a module does: each layer on a fixed input, some modules silenced.

A silenced module gives zeros. Because every layer gets the input that it had in the unedited
model, all layers are examined in one pass and independently of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.sites.stack import (
    LayerStack,
    stream_into,
    stream_out_of,
    with_stream,
    with_stream_out,
)

ROWS, TOKENS = 2, 11
"""Size of the probe; odd numbers that no width of a model has."""

Placed: TypeAlias = tuple[int, nn.Module]
"""A module as part of a layer: some modules are part of several."""
OutputHook: TypeAlias = Callable[[Tensor], Tensor | None]
"""What a module gives -> what to put in its place, or None to watch."""


class LayerCall(NamedTuple):
    """One passage of the stream through one layer; looped models pass a layer several times."""

    layer: int
    before: Tensor
    """(B, T, D), or with one more dimension where a model has several streams."""
    others: tuple[Tensor, ...]
    """What else of the stream's width the layer was given."""


class ModuleCall(NamedTuple):
    """A module inside a layer that gives something D wide."""

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
    return tokens.to(embeddings.device)


class Probe:
    """The model's layers under examination.

    Args:
        model: a `transformers` causal LM, in evaluation mode.
        stack: its layers.
        width: D.
    """

    def __init__(self, model: Any, stack: LayerStack, width: int) -> None:
        self.width = width
        self.stack = stack
        self.dtype: torch.dtype = model.get_input_embeddings().weight.dtype
        """What the weights are in: streams may be kept in more."""
        self._body = model.base_model
        self._tokens = probe_tokens(model)
        self.modules: list[ModuleCall] = []
        """Modules in the order in which their calls begin, each once a layer."""
        self.calls: list[LayerCall] = []
        self._record()

    @property
    def simple_modules(self) -> list[Placed]:
        """Modules that hold no matrix: norms, scales, activations."""
        return [
            (layer, module)
            for layer, _, module in self.modules
            if not any(parameter.ndim >= 2 for parameter in module.parameters())
        ]

    def tokens_first(self, stream: Tensor) -> Tensor:
        """A view (B, T, streams, D) of what passes between layers; most models have one stream.

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
        ablated: Collection[Placed] = (),
        *,
        inputs: Sequence[Tensor] | None = None,
        hooks: Sequence[tuple[Placed, OutputHook]] = (),
    ) -> list[Tensor]:
        """What each layer gives, in the order of `calls`.

        Args:
            ablated: modules whose output is replaced by zeros.
            inputs: streams that enter the layers; None: those of the unedited model.
            hooks: on outputs of modules, after they were silenced.
        """
        pinned = [call.before for call in self.calls] if inputs is None else inputs
        after: list[Tensor] = []
        layer = [-1]

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            layer[0] = self.calls[len(after)].layer
            # A copy: a layer may write into what it is given.
            return with_stream(args, kwargs, pinned[len(after)].clone())

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            after.append(stream_out_of(output).clone())
            layer[0] = -1

        with ExitStack() as held:
            for (place, module), hook in [*((s, torch.zeros_like) for s in ablated), *hooks]:
                placed = _within(layer, place, hook)
                held.callback(module.register_forward_hook(placed).remove)
            for module in dict.fromkeys(self.stack.layers):
                held.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                held.callback(module.register_forward_hook(leave).remove)
            self._body(input_ids=self._tokens, use_cache=False)
        return after

    @torch.no_grad()
    def _record(self) -> None:
        """One plain pass."""
        current: list[int] = []
        begun: dict[tuple[int, str], nn.Module] = {}
        wide: set[tuple[int, str]] = set()

        passed_on: list[object] = []

        def enter(index: int) -> Callable[..., None]:
            def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
                current.append(index)
                before = stream_into(args, kwargs)
                if any(v is p for v in (*args, *kwargs.values()) for p in passed_on):
                    raise UnsupportedModelError(
                        "layers pass a second state of the residual stream's width to each other "
                        "(as reversible layers do), which no edit of the first would reach"
                    )
                others = tuple(
                    value.clone()
                    for value in (*args, *kwargs.values())
                    if value is not before and self._is_wide(value)
                )
                self.calls.append(LayerCall(index, before.clone(), others))

            return hook

        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            current.pop()
            first = stream_out_of(output)
            given = output.values() if isinstance(output, dict) else output
            more = [] if isinstance(output, Tensor) else list(given)
            passed_on[:] = [v for v in more if self._is_wide(v) and v.shape == first.shape][1:]

        def begin(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, _args: Any) -> None:
                if current:
                    begun.setdefault((current[-1], path), module)

            return hook

        def end(path: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple) and output else output
                if current and self._is_wide(first):
                    wide.add((current[-1], path))

            return hook

        with ExitStack() as held:
            for index, layer in enumerate(self.stack.layers):
                before = layer.register_forward_pre_hook(enter(index), with_kwargs=True)
                held.callback(before.remove)
                for path, module in layer.named_modules():
                    if module is not layer:
                        held.callback(module.register_forward_pre_hook(begin(path)).remove)
                        held.callback(module.register_forward_hook(end(path)).remove)
                held.callback(layer.register_forward_hook(leave).remove)
            self._body(input_ids=self._tokens, use_cache=False)
        self.modules = [
            ModuleCall(*place, module) for place, module in begun.items() if place in wide
        ]

    def _is_wide(self, value: object) -> bool:
        return (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and value.ndim >= 2
            and value.shape[-1] == self.width
        )


def _within(layer: list[int], place: int, hook: OutputHook) -> Callable[..., Any]:
    """A forward hook that is at work inside one layer only."""

    def placed(_module: nn.Module, _args: Any, output: Any) -> Any:
        if layer[0] != place:
            return None
        replaced = hook(stream_out_of(output))
        return None if replaced is None else with_stream_out(output, replaced)

    return placed
