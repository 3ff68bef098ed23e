"""Runs Abliterix as it is installed in its own environment; one run serves all budgets.

Its checkpoint is a journal of Optuna. In batch mode it exports its best trial, so that a trial is
exported from a checkpoint that holds it alone.
"""

from __future__ import annotations

import json
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
    system_text,
)

STARTUP_TRIALS = 10
KL_TOKENS = 1
"""Its default."""
NAMES = {"harmless": "benign", "harmful": "target"}
STUDY, TRIAL_BEGUN, TRIAL_ENDED, TRIAL_ATTRIBUTE = 2, 4, 6, 8
"""Kinds of lines of a journal: attribute of the study, trial begun, ended, attribute of a trial."""
COMPLETE = 1


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
    for kind in KINDS:
        for use in ("train", "eval"):
            folder = task.folder / f"{kind}_{use}"
            folder.mkdir()
            text = (task.prompts / f"{kind}_{use}.txt").read_text(encoding="utf-8")
            (folder / "train.txt").write_text(text, encoding="utf-8")
    n_harmful = len((task.folder / "harmful_eval/train.txt").read_text("utf-8").split("\n")) - 1
    _write_config(task, task.folder, task.trials)
    started = time.time()
    process = run_process(
        [python.parent / "abliterix"],
        task.folder,
        environment(task.threads),
        log="search.log",
        seconds=task.limit(task.minutes[-1]),
        ended=lambda: len(read_trials(_journal(task.folder), 0.0, 1)) >= task.trials,
    )
    lines = _journal(task.folder)
    trials = read_trials(lines, started, n_harmful)
    begun = [_seconds(e["datetime_start"], started) for e in lines if e["op_code"] == TRIAL_BEGUN]
    facts = run_facts(process, trials, min(begun, default=None))

    def export(chosen: list[Trial]) -> None:
        for trial in chosen:
            _export(task, python, lines, trial["number"])

    return facts, choices_of(task, trials, export)


def read_trials(lines: list[dict[str, Any]], started: float, n_harmful: int) -> list[Trial]:
    """Complete trials of a journal.

    Args:
        lines: of the journal.
        started: when the process began, s of the clock.
        n_harmful: prompts that refusals are counted over.
    """
    begun = [line["datetime_start"] for line in lines if line["op_code"] == TRIAL_BEGUN]
    trials = []
    for end in lines:
        if end["op_code"] == TRIAL_ENDED and end["state"] == COMPLETE:
            attributes: dict[str, Any] = {}
            for line in lines:
                if line["op_code"] == TRIAL_ATTRIBUTE and line["trial_id"] == end["trial_id"]:
                    attributes |= line["user_attr"]
            when = _seconds(end["datetime_complete"], started)
            trial = {"number": end["trial_id"], "t_process": round(when, 2)}
            trial["seconds"] = round(when - _seconds(begun[end["trial_id"]], started), 2)
            trial |= {"refusals": attributes["refusals"], "n_harmful": n_harmful}
            trials.append({**trial, "kl": attributes["kl_divergence"], "kl_tokens": KL_TOKENS})
    return trials


def only(lines: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """A journal that holds one trial, which is all that was asked for."""
    left, begun = [], 0
    for line in lines:
        if line["op_code"] == TRIAL_BEGUN:
            begun += 1
            if begun == number + 1:
                left.append(line)
        elif "trial_id" in line:
            if line["trial_id"] == number:
                left.append({**line, "trial_id": 0})
        elif "settings" in line.get("user_attr", {}):
            settings = json.loads(line["user_attr"]["settings"])
            settings["optimization"]["num_trials"] = 1
            left.append({**line, "user_attr": {"settings": json.dumps(settings)}})
        elif not line.get("user_attr", {}).get("finished"):
            left.append(line)
    return left


def _export(task: Task, python: Path, lines: list[dict[str, Any]], number: int) -> None:
    folder = task.folder / f"export{number}"
    (folder / "ck").mkdir(parents=True)
    (original,) = (task.folder / "ck").glob("*.jsonl")
    text = "".join(json.dumps(line) + "\n" for line in only(lines, number))
    (folder / "ck" / original.name).write_text(text, encoding="utf-8")
    _write_config(task, folder, 1)
    words = [python.parent / "abliterix"]
    done = run_process(words, folder, environment(task.threads), log="export.log")
    if not any((folder / "out").glob("*.safetensors")):
        raise SystemExit(f"Abliterix saved no trial {number}:\n{done.tail}")
    (folder / "out").rename(task.folder / f"trial{number}")


def _journal(folder: Path) -> list[dict[str, Any]]:
    lines = []
    for file in (folder / "ck").glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # cut off when the process ended
                continue
    return lines


def _seconds(when: str, started: float) -> float:
    return datetime.fromisoformat(when).timestamp() - started


def _write_config(task: Task, folder: Path, trials: int) -> None:
    quoted = json.dumps
    config = [f"seed = {task.seed}", "non_interactive = true", 'non_interactive_output_dir = "out"']
    config += [f"system_prompt = {quoted(system_text(task.model))}", "[model]"]
    config += [f"model_id = {quoted(str(task.model.resolve()))}", 'device_map = "cpu"']
    config += [f"dtype_fallback_order = [{quoted(task.dtype)}]", "[inference]"]
    config += [f"max_gen_tokens = {task.response_tokens}", "batch_size = 40", "[optimization]"]
    config += [f"num_trials = {trials}", f"num_warmup_trials = {STARTUP_TRIALS}"]
    config += ['checkpoint_dir = "ck"', "[kl]", f"token_count = {KL_TOKENS}"]
    for kind, name in NAMES.items():
        for use, table in (("train", "prompts"), ("eval", "eval_prompts")):
            data = str((task.folder / f"{kind}_{use}").resolve())
            config += [f"[{name}_{table}]", f"dataset = {quoted(data)}"]
            config += ['split = "train"', 'column = "text"']
    (folder / "abliterix.toml").write_text("\n".join(config) + "\n", encoding="utf-8")
