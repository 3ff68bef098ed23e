"""Runs Heretic as it is installed in its own environment; one run serves all budgets.

Its trials are measured one after the other whatever the budget, so that what it would choose at a
shorter budget is read off the longest run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.search_quality.task import (
    Choice,
    Task,
    Trial,
    choices_of,
    environment,
    run_facts,
    run_process,
    system_text,
)

WORKER = Path(__file__).with_name("heretic_worker.py").resolve()
STARTUP_TRIALS = 10
"""Random ones; its default, 60, would be most of what these budgets hold."""
FILES = {"good": "harmless", "bad": "harmful"}


def run(task: Task, python: Path) -> tuple[dict[str, Any], dict[float, Choice]]:
    """Search for the longest budget, choose and export at each.

    Args:
        task: what is asked.
        python: the interpreter of its environment.

    Returns:
        Facts of the run, and a choice a budget.

    Raises:
        SystemExit: it ended before its time without a trial, or exported no model.
    """
    _write_config(task)
    env = environment(task.threads)
    words = [python, WORKER, "search", task.folder.resolve()]
    started = time.time()
    process = run_process(
        words,
        task.folder,
        env,
        log="search.log",
        seconds=task.limit(task.minutes[-1]),
        ended=lambda: _finished(task.folder) >= task.trials,  # it would ask a person next
        terminal=True,
    )
    rows = json.loads(_ask(python, "dump", task.folder.resolve()))
    trials = [_trial(row, started) for row in rows]
    first = min((row["start"] - started for row in rows), default=None)
    facts = run_facts(process, trials, first)

    def export(chosen: list[Trial]) -> None:
        for number in (trial["number"] for trial in chosen):
            target = task.folder / f"trial{number}"
            _ask(python, "export", task.folder.resolve(), str(number), target)

    return facts, choices_of(task, trials, export)


def _trial(row: dict[str, Any], started: float) -> Trial:
    figures = {name: row[name] for name in ("number", "refusals", "n_harmful", "kl")}
    return {
        **figures,
        "kl_tokens": 1,
        "t_process": round(row["complete"] - started, 2),
        "seconds": round(row["complete"] - row["start"], 2),
    }


def _write_config(task: Task) -> None:
    config = [
        f"model = {json.dumps(str(task.model.resolve()))}",
        f"n_trials = {task.trials}",
        f"n_startup_trials = {STARTUP_TRIALS}",
        "batch_size = 40",
        f"max_response_length = {task.response_tokens}",
        'response_prefix = ""',
        f"seed = {task.seed}",
        'study_checkpoint_dir = "ckpt"',
        f'dtypes = ["{task.dtype}"]',
        f"system_prompt = {json.dumps(system_text(task.model))}",
    ]
    for name, kind in FILES.items():
        for use, table in (("train", "prompts"), ("eval", "evaluation_prompts")):
            file = f"{name}_{use}.txt"
            shutil.copy(task.prompts / f"{kind}_{use}.txt", task.folder / file)
            config += [f"[{name}_{table}]", f'dataset = "{file}"']
    (task.folder / "config.toml").write_text("\n".join(config) + "\n", encoding="utf-8")


def _finished(folder: Path) -> int:
    journals = (folder / "ckpt").glob("*.jsonl")
    return sum(file.read_text(encoding="utf-8").count('"datetime_complete"') for file in journals)


def _ask(python: Path, *words: str | Path) -> str:
    """The last line that the worker prints."""
    command = [str(python), str(WORKER), *map(str, words)]
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"Heretic's worker failed at {words[0]}:\n{done.stderr[-2000:]}")
    return (done.stdout.strip().splitlines() or [""])[-1]
