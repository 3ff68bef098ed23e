"""What `make soak` did, in benchmarks/results/soak.json and in the guide. Runs nothing itself."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import library_versions, machine_facts

RESULTS = Path(__file__).parent / "results" / "soak.json"


def write(
    path: Path,
    minutes: float,
    rounds: Mapping[str, int],
    done: Mapping[str, int],
    left_out: Sequence[str],
    load: float,
) -> None:
    """Write what was done; a check that failed has ended the run before.

    Args:
        path: the file.
        minutes: how long it ran.
        rounds: studies by kind.
        done: kills, jumps, losses, full disks.
        left_out: kinds that the machine could not do.
        load: its load average before.
    """
    result = {
        "command": f"make soak SOAK_MINUTES={os.environ['SOAK_MINUTES']}",
        "date": date.today().isoformat(),
        "machine": machine_facts(1),
        "versions": library_versions("optuna", "sqlalchemy", "psycopg", "PyMySQL"),
        "load_average_before_and_after": [round(load, 1), round(os.getloadavg()[1], 1)],
        "minutes": minutes,
        "rounds": rounds,
        "done": done,
        "left_out": left_out,
    }
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def sentence(result: Mapping[str, Any]) -> str:
    """What docs/workers.md says of a run."""
    rounds = result["rounds"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in rounds.items())
    done = dict(result["done"])
    counts = [f"{done.pop(name, 0)} {name}" for name in ("kills", "clocks that jumped")]
    counts += [f"{count} times {kind}" for kind, count in done.items() if count]
    left_out = f" Left out: {', '.join(result['left_out'])}." if result["left_out"] else ""
    return (
        f"{result['minutes']:g} minutes, {sum(rounds.values())} studies ({kinds}): "
        f"{', '.join(counts)}. Nothing that was reported finished was lost, nothing was measured "
        f"twice, and every study ended.{left_out}"
    )
