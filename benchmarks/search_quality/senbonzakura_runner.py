"""Runs Senbonzakura as it is installed in its own environment; one run serves all budgets.

It divides prompts itself, half for directions and a quarter for its trials, of the training and
evaluation prompts together. It loads the model in the dtype that it was saved in. Its trials are in
a database of Optuna; a trial is saved by its own `--bake-config`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.search_quality.task import (
    KINDS,
    Choice,
    Task,
    Trial,
    choices_of,
    environment,
    run_facts,
    run_process,
)

LEAST_TOKENS = 96
"""Shorter responses have to be allowed."""
DATABASE = "out/senbon-study.db"
MODES = ("per_layer", "single")


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
    program, env = python.parent / "senbonzakura", environment(task.threads)
    searched = _build_track(task, program, env)
    words = _words(task, program, searched)
    started = time.time()
    process = run_process(
        [*words, "--trials", str(task.trials), "--out", "out"],
        task.folder,
        env,
        log="search.log",
        seconds=task.limit(task.minutes[-1]),
    )
    rows = read_rows(task.folder / DATABASE)
    trials = [_trial(row, started, searched) for row in rows if row["complete"]]
    first = min((_seconds(row["start"], started) for row in rows), default=None)
    facts = run_facts(process, trials, first)

    def export(chosen: list[Trial]) -> None:
        for number in (trial["number"] for trial in chosen):
            (params,) = (row["params"] for row in rows if row["number"] == number)
            name = f"trial{number}"
            (task.folder / f"{name}.json").write_text(json.dumps(config(params)), encoding="utf-8")
            baking = [*words, "--bake-config", f"{name}.json", "--out", name]
            done = run_process(baking, task.folder, env, log=f"{name}.log")
            if not any((task.folder / name).glob("*.safetensors")):
                raise SystemExit(f"Senbonzakura saved no trial {number}:\n{done.tail}")

    return facts, choices_of(task, trials, export)


def read_rows(database: Path) -> list[dict[str, Any]]:
    """Trials of its database that began: number, start, complete (None until then), params, attrs.

    Times are as Optuna writes them.
    """
    if not database.exists():
        return []
    connection = sqlite3.connect(database)
    try:
        rows = []
        asked = "SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials"
        for trial, number, state, start, complete in connection.execute(asked).fetchall():
            named = "SELECT param_name, param_value FROM trial_params WHERE trial_id = ?"
            params = dict(connection.execute(named, (trial,)))
            keyed = "SELECT key, value_json FROM trial_user_attributes WHERE trial_id = ?"
            attrs = {key: json.loads(text) for key, text in connection.execute(keyed, (trial,))}
            row = {"number": number, "start": start, "params": params, "attrs": attrs}
            rows.append({**row, "complete": complete if state == "COMPLETE" else None})
        return rows
    finally:
        connection.close()


def config(params: dict[str, float]) -> dict[str, Any]:
    """A trial's parameters in the form of the file that it bakes from."""

    def profile(part: str) -> list[float]:
        weights = [params[f"{part}_max_weight"], params[f"{part}_min_weight"]]
        place = int(params[f"{part}_max_weight_position"])
        return [place, *weights, int(params[f"{part}_min_weight_distance"])]

    return {
        "o_profile": profile("o"),
        "d_profile": profile("d"),
        "num_directions": int(params["num_directions"]),
        "dir_mode": MODES[int(params["dir_mode"])],
        "direction_index": params.get("direction_index"),
    }


def _trial(row: dict[str, Any], started: float, searched: int) -> Trial:
    when = _seconds(row["complete"], started)
    return {
        "number": row["number"],
        "t_process": round(when, 2),
        "seconds": round(when - _seconds(row["start"], started), 2),
        "refusals": round(row["attrs"]["refusals"] * searched),
        "n_harmful": searched,
        "kl": row["attrs"]["kl"],
    }


def _seconds(when: str, started: float) -> float:
    return datetime.fromisoformat(when).timestamp() - started


def _build_track(task: Task, program: Path, env: dict[str, str]) -> int:
    """Its folder of prompts, of as many of each kind; returns how many its trials are scored on.

    Raises:
        SystemExit: it refuses them.
    """
    lines = {
        kind: [
            line
            for use in ("train", "eval")
            for line in (task.prompts / f"{kind}_{use}.txt").read_text("utf-8").splitlines()
        ]
        for kind in KINDS
    }
    count = min(map(len, lines.values()))
    words: list[str | Path] = [program, "track", "--out", "track"]
    for kind in KINDS:
        text = "\n".join(lines[kind][:count]) + "\n"
        (task.folder / f"{kind}.txt").write_text(text, encoding="utf-8")
        words += [f"--{kind}", f"{kind}.txt"]
    words += ["--fit", str(count // 2), "--search", str(count // 4)]
    done = run_process(words, task.folder, env, log="track.log")
    if done.returncode != 0:
        raise SystemExit(f"Senbonzakura takes no such prompts:\n{done.tail}")
    return count // 4


def _words(task: Task, program: Path, searched: int) -> list[str | Path]:
    words: list[str | Path] = [program, "abliterate", "--model", task.model.resolve()]
    words += ["--device", "cpu", "--track", "track", "--seed", str(task.seed), "--panel", "off"]
    words += ["--gen-tokens", str(task.response_tokens), "--dir-prompts", str(2 * searched)]
    words += ["--short-budget-ok"] if task.response_tokens < LEAST_TOKENS else []
    words += ["--eval-refusal", str(searched), "--eval-kl", str(searched)]
    return [*words, "--eval-refusal-final", "0", "--capability-n", "0"]
