"""Runs this project's program, with and without refinement, as its command line offers it.

One run a budget: how it divides its time depends on how much there is. Setup (loading, calibration,
directions) counts, so that `--minutes` gets what the budget leaves after `reserve` seconds.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import heretic_kl
from benchmarks.search_quality.task import (
    KINDS,
    Choice,
    Task,
    Trial,
    choose,
    environment,
    run_process,
    with_front,
)

CHECKOUT = Path(heretic_kl.__file__).parents[1]
SHORTEST_MINUTES = 0.2
"""Left to the program where setup would take all."""
TEST_SCORES = "heretic-kl:test:"
RUN = "heretic-kl:run"
"""What a study keeps of its run: settings and more."""


def commit() -> str | None:
    """The commit of the code that runs, marked where files differ from it."""
    words = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip() or None


def run(task: Task, *, refine: bool, reserve: float, more: str) -> tuple[dict[str, Any], Choice]:
    """Search, pick and save at one budget.

    Args:
        task: with one budget.
        refine: False: the classic search.
        reserve: seconds of the budget for setup.
        more: further words of the command line.

    Returns:
        Facts of the run, and its choice.

    Raises:
        SystemExit: no trial was measured.
    """
    (minutes,) = task.minutes
    left = max(SHORTEST_MINUTES, minutes - reserve / 60)
    words = [*_words(task, refine, more), "--trials", str(task.trials), "--minutes", f"{left:g}"]
    pick = _saving(f"likely-refusals={task.target:g}")
    env = environment(task.threads, PYTHONPATH=str(CHECKOUT))
    started = time.time()
    code = commit()  # before the run: the checkout may change during it
    process = run_process([*words, *pick], task.folder, env, log="search.log")
    trials, first, tested = read_study(task.folder / "studies", started)
    if not trials:
        raise SystemExit(f"heretic-kl measured no trial in {task.folder}:\n{process.tail}")
    facts = {
        "commit": code,
        "seconds": process.seconds,
        "setup_seconds": round(first - started, 1),
        "search_seconds": round(max(trial["t_process"] for trial in trials), 1),
        "trials": trials,
    }
    trial, note = choose(trials, task.target, task.limit(minutes))
    if trial is None:
        return facts, Choice("", process.seconds, note)
    own = saved_trial(task.folder / "model") if process.returncode == 0 else None
    by_number = {t["number"]: t for t in trials}
    if own in by_number and by_number[own]["t_process"] <= task.limit(minutes):
        trial = by_number[own]
    elif own is not None:
        note = "; ".join(filter(None, ["its own pick ended after the budget", note]))
    if trial["number"] != own:
        tested |= _save_again(words, task, trials, trial["number"], env, started)
    trial = {**trial, "test_scores": tested.get(trial["number"])}
    choice = Choice("model", trial["t_process"], note, trial)

    def export(chosen: list[Trial]) -> None:
        if chosen:
            save_unmeasured(task, [t["number"] for t in chosen])

    return facts, with_front(choice, trials, task, minutes, export)


def setup_seconds(task: Task, more: str) -> float:
    """How long it takes until the first trial begins, from a run of one trial.

    Raises:
        SystemExit: no trial was measured.
    """
    words = [*_words(task, False, more), "--trials", "1"]
    env = environment(task.threads, PYTHONPATH=str(CHECKOUT))
    started = time.time()
    process = run_process(words, task.folder, env, log="setup.log")
    trials, first, _ = read_study(task.folder / "studies", started)
    if not trials:
        raise SystemExit(f"heretic-kl measured no trial in {task.folder}:\n{process.tail}")
    return first - started


def _words(task: Task, refine: bool, more: str) -> list[str]:
    words = [sys.executable, "-m", "heretic_kl", "--model", str(task.model.resolve())]
    for kind in KINDS:
        for use, name in (("train", "train"), ("validation", "eval"), ("test", "test")):
            file = (task.prompts / f"{kind}_{name}.txt").resolve()
            words += [f"--prompts.{kind}.{use}", str(file)]
    words += ["--prompt-set", "builtin", "--study-dir", "studies", "--test-trials", "0"]
    words += ["--seed", str(task.seed), "--threads", str(task.threads), "--dtype", task.dtype]
    words += ["--max-response-tokens", str(task.response_tokens)]
    return [*words, *([] if refine else ["--no-refine"]), *shlex.split(more)]


def _saving(rule: str) -> list[str]:
    return ["--pick", rule, "--save", "model", "--save-as", "merged", "--overwrite"]


def _save_again(
    words: list[str],
    task: Task,
    trials: list[Trial],
    number: int,
    env: dict[str, str],
    started: float,
) -> dict[int, Any]:
    """Save one trial of the finished study; returns test scores by trial."""
    shutil.rmtree(task.folder / "model", ignore_errors=True)
    refined = sum(trial["refined"] for trial in trials)
    learned = sum(trial["learned"] for trial in trials)
    # As many trials as there are: nothing is searched again.
    words = words[: words.index("--trials")] + ["--trials", str(len(trials) - refined)]
    words += ["--refinement.trials", str(learned)] if "--no-refine" not in words else []
    words += _saving(f"trial={number}")
    process = run_process(words, task.folder, env, log="save.log")
    if process.returncode != 0:
        raise SystemExit(f"heretic-kl saved no model in {task.folder}:\n{process.tail}")
    return read_study(task.folder / "studies", started)[2]


def save_unmeasured(task: Task, numbers: list[int]) -> None:
    """Save trials of the finished study as `trialNUMBER`, in one process that measures none.

    Raises:
        SystemExit: they cannot be saved.
    """
    env = environment(task.threads, PYTHONPATH=str(CHECKOUT))
    words = [sys.executable, "-m", "benchmarks.search_quality.heretic_kl_export", "studies"]
    process = run_process([*words, *map(str, numbers)], task.folder, env, log="front.log")
    if process.returncode != 0:
        raise SystemExit(f"heretic-kl saved no front in {task.folder}:\n{process.tail}")


def saved_trial(folder: Path) -> int | None:
    """The number of the trial that a saved model holds; None where there is none."""
    file = folder / "reproduce.json"
    if not file.exists():
        return None
    return int(json.loads(file.read_text(encoding="utf-8"))["trial"]["number"])


def read_study(folder: Path, started: float) -> tuple[list[Trial], float, dict[int, Any]]:
    """Complete trials, when the first one began (s, of the clock), and test scores by trial."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials: list[Trial] = []
    tested: dict[int, Any] = {}
    first = started
    for file in sorted(folder.glob("*.journal")):
        storage = JournalStorage(JournalFileBackend(str(file)))
        if file.stem not in optuna.get_all_study_names(storage):  # it ended before the study began
            continue
        study = optuna.load_study(study_name=file.stem, storage=storage)
        settings = json.loads(study.user_attrs[RUN])["settings"]
        begun = [t.datetime_start.timestamp() for t in study.trials if t.datetime_start]
        first = min(begun, default=started)
        complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
        counted = [trial for trial in complete if "refusals" in trial.user_attrs["scores"]]
        # The others were screened out.
        trials = [_trial(trial, started, settings["kl_tokens"]) for trial in counted]
        for attribute, value in study.user_attrs.items():
            number = attribute.removeprefix(TEST_SCORES)
            if number != attribute and int(number) >= 0:
                tested[int(number)] = _brief(json.loads(value))
    return trials, first, tested


def _trial(trial: Any, started: float, kl_tokens: int) -> Trial:
    scores = json.loads(trial.user_attrs["scores"])
    refusals = scores["refusals"]["details"]
    return {
        "number": trial.number,
        "t_process": round(trial.datetime_complete.timestamp() - started, 2),
        "seconds": round(float(trial.user_attrs.get("seconds", 0)), 2),
        "refusals": refusals["count"],
        "n_harmful": refusals["total"],
        "kl": scores["teacher_forced_kl"]["value"],
        "kl_tokens": kl_tokens,
        "refined": "refinement" in trial.user_attrs,
        "learned": json.loads(trial.user_attrs.get("refinement", '{"of": -1}')).get("of") is None,
        "scores": _brief(scores),
    }


def _brief(scores: dict[str, Any]) -> dict[str, Any]:
    """Values and errors alone."""
    return {
        name: {"value": score["value"], "standard_error": score["standard_error"]}
        for name, score in scores.items()
    }
