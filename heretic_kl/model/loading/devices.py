"""Which device and dtype a model is loaded to. Loads nothing."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

import torch

from heretic_kl.errors import ModelError

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_ROOT: Final = Path("/")
_LIMITS: Final = ("max", "current")
_PROCESSOR: Final = (
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
)
"""Lines of /proc/cpuinfo, of x86 and ARM, that say which arithmetic a processor has."""


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
    try:
        lines = (_ROOT / "proc/meminfo").read_text("ascii").splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration):
        return None
    return min([free, *_group_memory()])


def _group_memory() -> Iterator[int]:
    """Bytes that each limit of this process's control groups (version 2) leaves, inner ones first.

    The page cache that is not in use is counted as free: the system drops it where memory is short.
    """
    top = _ROOT / "sys/fs/cgroup"
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line[4:] for line in lines if line.startswith("0::/")), "")
    group = top / name
    for folder in [group, *group.parents]:
        if not folder.is_relative_to(top) or ".." in folder.parts:
            continue
        try:
            limit, used = (int((folder / f"memory.{n}").read_text("ascii")) for n in _LIMITS)
            stat = (folder / "memory.stat").read_text("ascii").splitlines()
        except (OSError, ValueError):  # "max", or no such limit
            continue
        cached = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
        yield max(0, limit - used + cached)


def processor() -> str:
    """This machine's processor, its model and instructions; its name where that is not known."""
    try:
        text = (_ROOT / "proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        text = ""
    lines = {line for line in text.splitlines() if line.partition(":")[0].strip() in _PROCESSOR}
    return "\n".join([platform.machine(), *(sorted(lines) or [platform.node()])])


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)
