"""Tells that memory ran out, on CUDA, MPS and CPU, and gives memory back. Runs no model."""

from __future__ import annotations

import gc
import re
import sys

import torch

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less work at once would help; on MPS and CPU torch raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    from accelerate.utils.memory import should_reduce_batch_size

    return bool(should_reduce_batch_size(error))


def clear_device_memory() -> None:
    """Give memory that torch keeps for later back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def memory_needed(error: BaseException) -> str:
    """How much memory would have been enough for what failed, as far as the error says.

    What was in use at most, and what was asked for on top of it.
    """
    asked = re.search(r"ried to allocate ([\d.]+) ?([KMG]?)i?B?", str(error))
    size = 0.0 if asked is None else float(asked[1]) * _UNITS[asked[2]]
    if isinstance(error, torch.OutOfMemoryError) and torch.cuda.is_available():
        used, place = float(torch.cuda.max_memory_allocated()), "on the device"
    else:
        used, place = _peak_of_process(), "for the process"
    return f"about {(used + size) / 2**30:.1f} GiB {place}"


def _peak_of_process() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) * (1 if sys.platform == "darwin" else 1024)
