"""Weights that are not whole in one place: offloaded ones, and those of tensor parallelism.

Knows nothing about layers or sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from heretic_kl.errors import MeasurementError
from heretic_kl.model.loading.devices import free_memory
from heretic_kl.model.out_of_memory import clear_device_memory, is_out_of_memory

MOST_OF_MEMORY = 0.9
"""Share of the machine's free memory that offloaded weights may take."""


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


def offload(modules: Sequence[nn.Module], check: Callable[[], object]) -> int | None:
    """Move weights on an accelerator to the machine's memory; each is brought where it is needed.

    Args:
        modules: whose weights; those of one module that is listed twice are moved once.
        check: runs the model; where it raises, the weights go back.

    Returns:
        How many bytes; None: nothing was moved, because they are on no accelerator, are quantized
        or split, are placed by hooks already, do not fit, or the model does not run this way.

    Raises:
        MeasurementError: weights have to go back, and the accelerator has no memory for them any
            more; those that wait still do.
    """
    chosen = list({id(module): module for module in modules}.values())
    weights = [parameter for module in chosen for parameter in module.parameters()]
    if not weights or any(
        not on_accelerator(w) or is_sharded(w) or not w.is_floating_point() or w.dtype.itemsize < 2
        for w in weights
    ):
        return None
    if any(hasattr(inner, "_hf_hook") for module in chosen for inner in module.modules()):
        return None
    size = sum(weight.nbytes for weight in weights)
    free = free_memory(torch.device("cpu"))
    if free is not None and size > MOST_OF_MEMORY * free:
        return None
    if _runs_offloaded(chosen, check):
        return size
    clear_device_memory()  # of what the check left
    _put_back(chosen)
    return None


def _runs_offloaded(modules: Sequence[nn.Module], check: Callable[[], object]) -> bool:
    from accelerate.hooks import attach_align_device_hook

    try:
        for module in modules:
            device = device_of(module)
            stored = {name: tensor.to("cpu") for name, tensor in module.state_dict().items()}
            attach_align_device_hook(module, device, offload=True, weights_map=stored)
        check()
    except Exception:  # of a model that reads weights past its hooks, or of a full device: any
        return False
    return True


def _put_back(modules: Sequence[nn.Module]) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    try:
        for module in modules:
            remove_hook_from_submodules(module)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MeasurementError(
            "out of memory: the model cannot run with its layers' weights in the machine's memory, "
            "and the device has no room for them any more: end what else uses it, or use "
            "--device-map auto"
        ) from error


def on_accelerator(tensor: Tensor) -> bool:
    """Whether a tensor is in a memory that is not the machine's; that of MPS is."""
    return tensor.device.type not in ("cpu", "mps", "meta")


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
