"""Which tensors of a writing module write, and along which axis. Leaves all tensors unchanged.

A direction is added to a tensor along one of its axes. If that axis writes, the module's output
changes along that direction alone. So it does not matter whether a module stores (D, F), (F, D) or
experts in three dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heretic_kl.model.placement import in_memory, replaced, whole
from heretic_kl.model.sites.probe import Probe
from heretic_kl.model.sites.stack import stream_out_of, submodule

PARALLEL = 0.05
"""Largest share of a change that may be off the direction: rounding in bfloat16 gives 0.02."""


class WritingTensor(NamedTuple):
    """A weight or bias whose vectors along one axis are added to the residual stream."""

    name: str
    """Inside its module."""
    axis: int
    """Of the stored tensor; D long."""
    alone: bool = True
    """Only such tensors contribute to the output; some experts return their input as it is."""

    def vectors(self, stored: Tensor) -> Tensor:
        """A view (..., D) of the tensor."""
        return stored.movedim(self.axis, -1)


class Located(NamedTuple):
    """A module inside a layer."""

    layer: int
    path: str


class _Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.no_grad()
def writing_tensors(
    probe: Probe, places: Sequence[Located]
) -> dict[Located, tuple[WritingTensor, ...]]:
    """The writing tensors of modules.

    A module that gets no token of the probe has the tensors of the others of its kind. A quantized
    module has none.
    """
    places_by_kind: dict[tuple[object, ...], list[Located]] = {}
    for place in places:
        places_by_kind.setdefault(_kind(_module(probe, place)), []).append(place)
    calls = _calls(probe, places)
    tensors_by_place: dict[Located, tuple[WritingTensor, ...]] = {}
    for same_kind in places_by_kind.values():
        tensors: tuple[WritingTensor, ...] = ()
        called = next((place for place in same_kind if place in calls), None)
        # Some modules take their weights as arguments: there a module around them is called.
        outer = called
        while called is not None and outer is not None and not tensors:
            if outer in calls:
                call = calls[outer]
                with in_memory(_module(probe, outer)):
                    tensors = _tensors(
                        _module(probe, outer), call, _module(probe, called), probe.width
                    )
            outer = _parent(outer)
        tensors_by_place.update(dict.fromkeys(same_kind, tensors))
    return tensors_by_place


def _module(probe: Probe, place: Located) -> nn.Module:
    module = submodule(probe.stack.layers[place.layer], place.path)
    assert module is not None  # discovery found it there
    return module


def _parent(place: Located) -> Located | None:
    path = place.path.rpartition(".")[0]
    return Located(place.layer, path) if path else None


def _kind(module: nn.Module) -> tuple[object, ...]:
    shapes = tuple((name, tuple(p.shape), p.dtype) for name, p in module.named_parameters())
    return (type(module), shapes)


def _calls(probe: Probe, places: Sequence[Located]) -> dict[Located, _Call]:
    """The first call of each module and of each module around it."""
    calls: dict[Located, _Call] = {}
    modules: dict[Located, nn.Module] = {}
    for place in places:
        outer: Located | None = place
        while outer is not None and outer not in modules:
            modules[outer] = _module(probe, outer)
            outer = _parent(outer)

    def recorder(place: Located) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if place not in calls and stream_out_of(output).numel():
                calls[place] = _Call(args, kwargs)

        return hook

    with ExitStack() as handles:
        for place, module in modules.items():
            hook = module.register_forward_hook(recorder(place), with_kwargs=True)
            handles.enter_context(hook)
        probe.run()
    return calls


def _tensors(
    called: nn.Module, call: _Call, holder: nn.Module, width: int
) -> tuple[WritingTensor, ...]:
    """Tensors of the holder that write to the output of the called module."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(width, generator=generator)
    direction = direction / direction.norm()
    before = _output(called, call)
    tensors = []
    for name, parameter in list(holder.named_parameters()):
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            continue  # quantized: an edit cannot be baked into it
        for axis, size in enumerate(parameter.shape):
            tensor = WritingTensor(name, axis)
            if size != width:
                continue
            with _amplified(holder, tensor, direction):
                after = _output(called, call)
            if _along(after.float() - before.float(), before, direction):
                tensors.append(tensor)
                break
    if not tensors:
        return ()
    with without(holder, tensors):
        rest = _output(called, call)
    alone = float(rest.float().norm()) <= 1e-6 * float(before.float().norm())
    return tuple(tensor._replace(alone=alone) for tensor in tensors)


@contextmanager
def without(module: nn.Module, tensors: Sequence[WritingTensor]) -> Iterator[None]:
    """The module with its writing tensors zero, until the block is left."""
    with in_memory(module), ExitStack() as stack:
        for tensor in tensors:
            zeros = torch.zeros_like(module.get_parameter(tensor.name).detach())
            stack.enter_context(replaced(module, tensor.name, zeros))
        yield


def _output(module: nn.Module, call: _Call) -> Tensor:
    return stream_out_of(module(*call.args, **call.kwargs))


def _along(change: Tensor, before: Tensor, direction: Tensor) -> bool:
    """Whether an output has changed, and along the direction alone."""
    rows = change.reshape(-1, change.shape[-1])
    total = float(rows.norm())
    if total <= 1e-6 * float(before.float().norm()):
        return False
    along = direction.to(rows.device)
    off = rows - (rows @ along)[:, None] * along
    return float(off.norm()) <= PARALLEL * total


@contextmanager
def _amplified(module: nn.Module, tensor: WritingTensor, direction: Tensor) -> Iterator[None]:
    """The tensor with random vectors along the direction added, until the block is left."""
    original = whole(module.get_parameter(tensor.name).detach())
    vectors = tensor.vectors(original)
    generator = torch.Generator().manual_seed(2)
    amounts = torch.randn(vectors.shape[:-1], generator=generator).to(original.device)
    size = float(original.float().abs().mean()) + 1e-3
    scale = size * direction.numel() ** 0.5
    # In the tensor's own dtype: a tensor of many experts may be most of a layer.
    added = amounts[..., None].to(original.dtype) * (scale * direction).to(original)
    amplified = (vectors + added).movedim(-1, tensor.axis).contiguous()
    with replaced(module, tensor.name, amplified):
        yield
