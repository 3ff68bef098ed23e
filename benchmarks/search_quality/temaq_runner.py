"""Runs Temaq as it is installed in its own environment; one run a budget.

It verifies by generation and exports at its end, so a search that is cut short has no candidate.
Its search is given a share of the budget, and its own pick counts if the whole run ends in time.
It has one objective. Its front is that of the two figures that it prints for a trial, the soft
share of refusals and the KL; such a trial is saved by its own `--params-from`, from a card with
what its checkpoint says of the trial.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.search_quality.task import (
    Choice,
    Task,
    Trial,
    environment,
    run_process,
    with_front,
)

SEARCH_SHARE = 0.5
PROBES = 64
KL_TOKENS = 8
"""Its default."""
TRIAL = re.compile(r"Trial\s+(\d+)(?:/\d+)?\s*\|\s*([\d.]+)s(.*)")
MEASURED = re.compile(r"refusal ([\d.]+).*KL ([\d.]+)")
VERIFIED = re.compile(r"Candidate \(trial #(\d+),.*\((\d+)/(\d+)\) KL=([\d.]+)")
PICKED = re.compile(r"Final selection: trial #(\d+)")
COMPONENTS = {"attn_out": "attn.o_proj", "mlp_down": "mlp.down_proj"}
"""Name in its checkpoint -> in its card."""


def run(task: Task, python: Path) -> tuple[dict[str, Any], dict[float, Choice]]:
    """Search and export at one budget.

    Args:
        task: with one budget.
        python: the interpreter of its environment.

    Returns:
        Facts of the run, and its own pick.
    """
    (minutes,) = task.minutes
    process = run_process(
        _words(task, python, minutes, "model"),
        task.folder,
        environment(task.threads),
        log="search.log",
        seconds=task.limit(minutes),
    )
    trials = read_trials(process.lines)
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
        return facts, {minutes: Choice("", process.seconds, f"no model: {why}")}
    choice = Choice("model", process.seconds, trial=read_pick(process.lines))
    measured = [trial for trial in trials if "kl" in trial]  # the others were screened out

    def export(chosen: list[Trial]) -> None:
        for trial in chosen:
            _export(task, python, trial["number"], minutes)

    return facts, {minutes: with_front(choice, measured, task, minutes, export)}


def read_trials(lines: list[tuple[float, str]]) -> list[Trial]:
    """Its trials, with what they print; `refusals` is a soft share, not a count."""
    trials = []
    for when, line in lines:
        if matched := TRIAL.search(line):
            trial = {"number": int(matched[1]), "t_process": when, "seconds": float(matched[2])}
            trial["printed"] = matched[3].strip(" |")
            if figures := MEASURED.search(line):
                trial |= {"refusals": float(figures[1]), "kl": float(figures[2])}
            trials.append(trial)
    return trials


def read_pick(lines: list[tuple[float, str]]) -> Trial | None:
    """What it printed of the candidate that it chose; None where it counted no responses."""
    text = "\n".join(line for _, line in lines)
    picked = PICKED.search(text)
    for number, refusals, n, kl in VERIFIED.findall(text):
        if picked is not None and number == picked[1]:
            counted = {"number": int(number), "refusals": int(refusals), "n_harmful": int(n)}
            return {**counted, "kl": float(kl), "kl_tokens": KL_TOKENS}
    return None


def card(params: dict[str, Any]) -> str:
    """A trial's parameters in the form of the card that it writes and reads."""
    mode, index = params["direction_mode"], params["direction_index"]
    rows = {"direction_index": "per layer" if mode == "per_layer" else f"{index:g}"}
    for name, kernel in params["kernels"].items():
        rows |= {
            f"{COMPONENTS[name]}.max_weight": kernel["strength"],
            f"{COMPONENTS[name]}.max_weight_position": kernel["center"],
            f"{COMPONENTS[name]}.min_weight": 0,
            f"{COMPONENTS[name]}.min_weight_distance": kernel["radius"],
            f"{COMPONENTS[name]}.kernel_shape": kernel["shape"],
        }
    lines = ["## Abliteration parameters", "", "| Parameter | Value |", "| :-------- | :---: |"]
    return "\n".join([*lines, *(f"| **{name}** | {value} |" for name, value in rows.items()), ""])


def _export(task: Task, python: Path, number: int, minutes: float) -> None:
    """Save one trial.

    Raises:
        SystemExit: it wrote no model.
    """
    (checkpoint,) = (
        file
        for file in (task.folder / "W/cache/runs").glob("*.json")
        if not file.name.endswith(".verified.json")
    )
    history = json.loads(checkpoint.read_text(encoding="utf-8"))["history"]
    (params,) = (trial["params"] for trial in history if trial["attempt"] == number)
    (task.folder / f"trial{number}.md").write_text(card(params), encoding="utf-8")
    words = _words(task, python, minutes, f"trial{number}")
    words += ["--params-from", f"trial{number}.md", "--params-mode", "apply", "--verify", "none"]
    name = f"trial{number}.log"
    done = run_process(words, task.folder, environment(task.threads), log=name)
    if not any((task.folder / f"trial{number}").glob("*.safetensors")):
        raise SystemExit(f"Temaq saved no trial {number}:\n{done.tail}")


def _words(task: Task, python: Path, minutes: float, output: str) -> list[str | Path]:
    prompts = task.prompts.resolve()
    words: list[str | Path] = [python.parent / "temaq-abliterated", task.model.resolve()]
    words += ["--harmful-file", prompts / "harmful_train.txt"]
    words += ["--harmless-file", prompts / "harmless_train.txt"]
    words += ["--workdir", "W", "--device", "cpu", "--eval-dtype", task.dtype, "--trials", "0"]
    words += ["--n-probe", str(PROBES), "--verify-probes", str(PROBES)]
    words += ["--kl-tokens", str(KL_TOKENS), "--max-new-tokens", str(task.response_tokens)]
    words += ["--select", "auto", "--no-report", "--overwrite-output"]
    words += ["--seed", str(task.seed), "--output", output]
    return [*words, "--time-budget-min", f"{minutes * SEARCH_SHARE:g}"]
