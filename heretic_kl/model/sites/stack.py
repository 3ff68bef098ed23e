"""The list of layers that the residual stream passes through. Knows nothing about sites.

A forward pass shows which list of modules that is and which of a layer's arguments is the stream.
Names would not do: transformers keeps its lists of layers in more than a dozen places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from heretic_kl.errors import UnsupportedModelError

ModuleSequence: TypeAlias = nn.ModuleList | nn.Sequential
STREAM_ARGUMENTS = ("hidden_states", "hidden_state", "hidden", "x")
"""Names under which layers take the stream, where they take it by name."""


@dataclass(frozen=True)
class LayerStack:
    """Where the layers are."""

    path: str
    """Dotted path of the list inside the model; several, separated by commas, where the stream
    passes through several."""
    layers: tuple[nn.Module, ...]
    names: tuple[str, ...]
    """Dotted path of each layer."""


def find_stack(
    model: nn.Module, width: int, run: Callable[[], object], *, path: str | None = None
) -> LayerStack:
    """The list of modules that the residual stream passes through.

    Args:
        model: a causal language model.
        width: D, the width of its residual stream.
        run: a forward pass over a few tokens.
        path: dotted path of the list, several with commas between; None: it is found.

    Raises:
        UnsupportedModelError: no list, or not the named one, has modules that take and return a
            stream D wide.
    """
    lists = _outer_lists(model)
    if path is not None:
        lists = {name: _named_list(model, name, lists) for name in map(str.strip, path.split(","))}
    layers_by_list = _layers_by_list(lists, width, run)
    if not layers_by_list:
        tried = ", ".join(f"{name} ({len(modules)})" for name, modules in lists.items()) or "none"
        raise UnsupportedModelError(
            f"no list of layers found in {type(model).__name__}: of its lists of modules "
            f"({tried}) none takes and returns a residual stream {width} wide"
        )
    places = [(name, index) for name in layers_by_list for index in range(len(lists[name]))]
    return LayerStack(
        ", ".join(layers_by_list),
        tuple(lists[name][index] for name, index in places),
        tuple(f"{name}.{index}" for name, index in places),
    )


def _named_list(model: nn.Module, name: str, lists: Mapping[str, ModuleSequence]) -> ModuleSequence:
    module = submodule(model, name)
    if isinstance(module, nn.ModuleList | nn.Sequential):
        return module
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of modules at {name!r}; its lists are "
        f"{', '.join(lists) or 'none'}"
    )


def likely_layers(model: nn.Module) -> tuple[nn.Module, ...] | None:
    """The longest list of modules, without running the model; None: there is none.

    Good enough for hooks between layers; editing uses `find_stack`.
    """
    longest = max(_outer_lists(model).values(), key=len, default=None)
    return None if longest is None or len(longest) < 2 else tuple(longest)


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path, or None."""
    current: nn.Module = root
    for name in path.split("."):
        child = getattr(current, name, None)
        if not isinstance(child, nn.Module):
            return None
        current = child
    return current


def stream_into(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The residual stream among a layer's arguments."""
    _, stream = _place_in(args, kwargs)
    return stream


def with_stream(
    args: Sequence[Any], kwargs: Mapping[str, Any], stream: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with another residual stream."""
    place, _ = _place_in(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], stream, *args[place + 1 :]), dict(kwargs)
    return tuple(args), {**kwargs, place: stream}


def stream_out_of(output: Any) -> Tensor:
    """The residual stream in a layer's return value: alone, or first in a tuple."""
    first = output
    if isinstance(output, Mapping):
        first = next(iter(output.values()))
    elif isinstance(output, (tuple, list)):
        first = output[0]
    if not isinstance(first, Tensor):
        raise UnsupportedModelError(f"a layer returns a {type(output).__name__} without a tensor")
    return first


def with_stream_out(output: Any, stream: Tensor) -> Any:
    """A layer's return value with another residual stream."""
    if isinstance(output, tuple):
        return (stream, *output[1:])
    if isinstance(output, list):
        return [stream, *output[1:]]
    if isinstance(output, Mapping):
        changed = dict(output)
        changed[next(iter(changed))] = stream
        return type(output)(changed)  # type: ignore[call-arg]
    return stream


def _place_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return index, value
    for name in STREAM_ARGUMENTS:
        if isinstance(kwargs.get(name), Tensor):
            return name, kwargs[name]
    raise UnsupportedModelError("a layer takes no residual stream that could be recognized")


def _outer_lists(model: nn.Module) -> dict[str, ModuleSequence]:
    """Lists of modules that are in no other list, by dotted path."""
    lists: dict[str, ModuleSequence] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and not inside:
            lists[name] = module
    return lists


def _layers_by_list(
    lists: Mapping[str, ModuleSequence], width: int, run: Callable[[], object]
) -> dict[str, set[int]]:
    """Which modules of which lists take and return a stream in a forward pass."""
    indices: dict[str, set[int]] = {}

    def observer(name: str, index: int) -> Callable[..., None]:
        def observe(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            try:
                before, after = stream_into(args, kwargs), stream_out_of(output)
            except (UnsupportedModelError, IndexError, StopIteration):
                return
            if before.shape == after.shape and before.shape[-1] % width == 0:
                indices.setdefault(name, set()).add(index)

        return observe

    with ExitStack() as handles:
        for name, modules in lists.items():
            for index, module in enumerate(modules):
                if not any(module.children()):
                    continue  # a projection, not a layer
                hook = observer(name, index)
                handles.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        run()
    return indices
