"""Weights that are not whole in one place: offloaded ones, and those of tensor parallelism.

Knows nothing about layers or sites.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether processes of tensor parallelism hold parts of it, or copies that know each other."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts; where it is sharded, every process has to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def placed_like(values: Tensor, parameter: Tensor) -> Tensor:
    """New values for a parameter, sharded as it is."""
    if not is_sharded(parameter) or is_sharded(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(values, mesh, placements, src_data_rank=None)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a sharded tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_offloaded(module: nn.Module) -> bool:
    """Whether weights in a module are somewhere else until it runs."""
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def offloads(model: nn.Module) -> bool:
    """Whether all weights that are not in memory are brought when they are needed."""
    brought = {
        id(parameter)
        for module in model.modules()
        for _ in _offloading(module)
        for parameter in module.parameters()
    }
    missing = (p for p in model.parameters() if p.device.type == "meta")
    return all(id(parameter) in brought for parameter in missing)


def device_of(module: nn.Module) -> torch.device:
    """Where a module runs."""
    for inner in module.modules():
        for hook in _offloading(inner):
            return torch.device(_device(hook.execution_device))
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Have the offloaded weights of a module where it runs until the block is left."""
    with ExitStack() as stack:
        for inner in module.modules():
            for hook in _offloading(inner):
                stack.enter_context(_loaded(inner, hook))
        yield


@contextmanager
def replaced(module: nn.Module, name: str, values: Tensor) -> Iterator[None]:
    """Another tensor in place of a parameter's, whole, until the block is left."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    original = owner._parameters[leaf]
    assert original is not None
    other = placed_like(values.to(original.dtype), original)
    owner._parameters[leaf] = nn.Parameter(other, requires_grad=False)
    try:
        yield
    finally:
        owner._parameters[leaf] = original


def _offloading(module: nn.Module) -> Iterator[Any]:
    """Hooks of accelerate on this very module that bring its weights and take them away."""
    hook = getattr(module, "_hf_hook", None)
    for inner in getattr(hook, "hooks", () if hook is None else (hook,)):
        if getattr(inner, "offload", False):
            yield inner


@contextmanager
def _loaded(module: nn.Module, hook: Any) -> Iterator[None]:
    hook.pre_forward(module)
    hook.offload = False  # the module may run in the block
    try:
        yield
    finally:
        hook.offload = True
        hook.post_forward(module, None)


def _device(name: Any) -> Any:
    return f"cuda:{name}" if isinstance(name, int) else name
