"""The machine a benchmark ran on, without its name."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

from heretic_kl import __version__


def machine_facts(threads: int) -> dict[str, object]:
    """Processor, cores, threads used, system."""
    return {
        "processor": _processor(),
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
