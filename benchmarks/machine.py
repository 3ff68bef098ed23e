"""The machine a benchmark ran on, without its name, and what it was asked to do."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from heretic_kl import __version__

DTYPES = ("auto", "float32", "bfloat16")


def run_facts(seed: int | list[int], threads: int, dtype: str, *packages: str) -> dict[str, object]:
    """What every results file begins with; `packages` names more of them to tell versions of."""
    return {
        "command": command_line(),
        "date": date.today().isoformat(),
        "seed": seed,
        "machine": machine_facts(threads),
        "versions": library_versions(*packages),
        "dtype": dtype,
    }


def command_line() -> str:
    """How this script was called; of paths outside the current folder only the last part."""
    words = [
        f"PATH/{Path(word).name}" if Path(word).is_absolute() else word for word in sys.argv[1:]
    ]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def resolved_dtype(setting: str) -> str:
    """`auto`: what a run takes on this processor; bfloat16 only where it multiplies that."""
    if setting != "auto":
        return setting
    import torch

    from heretic_kl.model.loading.devices import dtype_candidates

    return str(dtype_candidates("auto", torch.device("cpu"))[0]).removeprefix("torch.")


def results_file(stem: str, dtype: str) -> Path:
    """Where figures of a dtype go; bfloat16's have no suffix."""
    suffix = "" if dtype == "bfloat16" else f"_{dtype}"
    return Path(__file__).parent / f"results/{stem}{suffix}.json"


def machine_facts(threads: int) -> dict[str, object]:
    """Processor and its widest vectors, cores, threads used, system."""
    import torch

    return {
        "processor": _processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def library_versions(*more: str) -> dict[str, str]:
    """Versions of what figures depend on; `more` names further packages."""
    return {"heretic-kl": __version__, **{n: version(n) for n in ("torch", "transformers", *more)}}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
