"""The machine a benchmark ran on, without its name."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def machine_facts(threads: int) -> dict[str, object]:
    """Processor, cores, threads used, system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
