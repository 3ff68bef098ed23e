"""Runs Temaq as it is installed in its own environment; one run a budget.

It verifies by generation and exports at its end, so a search that is cut short has no candidate.
Its search is given a share of the budget, and its own pick counts if the whole run ends in time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.search_quality.task import Choice, Task, environment, run_process

SEARCH_SHARE = 0.5
PROBES = 64
TRIAL = re.compile(r"Trial\s+(\d+)(?:/\d+)?\s*\|\s*([\d.]+)s(.*)")


def run(task: Task, python: Path) -> tuple[dict[str, Any], Choice]:
    """Search and export at one budget.

    Args:
        task: with one budget.
        python: the interpreter of its environment.

    Returns:
        Facts of the run, and its own pick.
    """
    (minutes,) = task.minutes
    words = [python.parent / "temaq-abliterated", task.model.resolve(), *_options(task, minutes)]
    process = run_process(
        words,
        task.folder,
        environment(task.threads),
        log="search.log",
        seconds=task.limit(minutes),
    )
    printed = [(when, TRIAL.search(line)) for when, line in process.lines]
    trials = [
        {
            "number": int(m[1]),
            "t_process": when,
            "seconds": float(m[2]),
            "printed": m[3].strip(" |"),
        }
        for when, m in printed
        if m
    ]
    first = trials[0]["t_process"] - trials[0]["seconds"] if trials else process.seconds
    facts = {
        "seconds": process.seconds,
        "setup_seconds": round(first, 1),
        "search_seconds": trials[-1]["t_process"] if trials else None,
        "trials": trials,
    }
    saved = any((task.folder / "model").glob("*.safetensors"))
    if process.killed or not saved:
        why = "had not ended in time" if process.killed else f"exit code {process.returncode}"
        return facts, Choice("", process.seconds, f"no model: {why}")
    return facts, Choice("model", process.seconds)


def _options(task: Task, minutes: float) -> list[str | Path]:
    prompts = task.prompts.resolve()
    words: list[str | Path] = ["--harmful-file", prompts / "harmful_train.txt"]
    words += ["--harmless-file", prompts / "harmless_train.txt"]
    words += ["--workdir", "W", "--device", "cpu", "--eval-dtype", task.dtype, "--trials", "0"]
    words += ["--n-probe", str(PROBES), "--verify-probes", str(PROBES)]
    words += ["--max-new-tokens", str(task.response_tokens), "--select", "auto", "--no-report"]
    words += ["--seed", str(task.seed), "--output", "model", "--overwrite-output"]
    return [*words, "--time-budget-min", f"{minutes * SEARCH_SHARE:g}"]
