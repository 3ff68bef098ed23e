"""Which device and dtype a model is loaded to. Loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from heretic_kl.errors import ModelError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def resolve_device(setting: str) -> torch.device:
    """The device that a setting names; `auto` is CUDA, MPS or the CPU.

    Raises:
        ModelError: torch does not know the device, or this machine does not have it.
    """
    if setting == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(setting)
        torch.zeros(1, device=device).item()  # `meta` has no values
    except Exception as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ModelError(
            f"device {setting!r} cannot be used: {reason}; use auto, cpu, cuda, cuda:1 or mps"
        ) from error
    return device


def dtype_candidates(setting: DtypeName, device: torch.device) -> tuple[torch.dtype, ...]:
    """Dtypes to try, best first."""
    if setting != "auto":
        named: torch.dtype = getattr(torch, setting)
        return (named,)
    if device.type == "cpu":
        # Without hardware support bfloat16 is several times slower than float32 on a CPU.
        fast = cpu_multiplies_bfloat16()
        return (torch.bfloat16, torch.float32) if fast else (torch.float32,)
    return (torch.bfloat16, torch.float16, torch.float32)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device can still hold, of a CPU what this machine and container allow.

    None: it does not say.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    group = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    try:
        limit, used = (int((group / f"memory.{n}").read_text("ascii")) for n in ("max", "current"))
    except (OSError, ValueError):  # "max", or no such limit
        return free
    return min(free, max(0, limit - used))


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)
