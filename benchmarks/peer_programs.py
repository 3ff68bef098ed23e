"""Runs Temaq and Heretic as they are installed, and reads what a trial of theirs takes."""

from __future__ import annotations

import json
import os
import pty
import re
import statistics
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any

PROMPTS, TOKENS, SEED = 40, 40, 1
COUNTED_TRIALS = 4
LONGEST_SECONDS = 1500


def write_prompts(folder: Path) -> None:
    """Plain text files, one prompt a line, for the peers."""
    from heretic_kl.prompts import DatasetSpec, load_prompts

    for kind, name in (("harmful", "bad"), ("harmless", "good")):
        for split, use in (("train", "train"), ("validation", "eval")):
            prompts = load_prompts(DatasetSpec(f"builtin:{kind}", split, limit=PROMPTS))
            lines = [" ".join(prompt.user.split()) for prompt in prompts]
            (folder / f"{name}_{use}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_temaq(
    program: Path, model: Path, folder: Path, trials: int, threads: int, dtype: str
) -> dict[str, Any]:
    """Its own search; seconds of each trial as it prints them.

    And which layers it runs in a trial, from a second, short search whose seconds do not count.
    """
    words = [str(program), *temaq_arguments(model, trials, dtype, "t")]
    done = subprocess.run(
        words, cwd=folder, env=environment(threads), capture_output=True, text=True, check=True
    )
    text = done.stdout + done.stderr
    seconds = [float(s) for s in re.findall(r"Trial\s+\d+/\d+\s*\|\s*([\d.]+)s", text)]
    kept = re.search(r"Kept (\d+)/\d+ harmful", text)
    return {
        "version": "1.1.1",
        "trials": len(seconds),
        "harmful_prompts_kept": int(kept[1]) if kept else PROMPTS,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "slowest_seconds": max(seconds),
        "fastest_seconds": min(seconds),
        "trials_per_minute": 60 / statistics.mean(seconds),
        "computed_by_trial": count_temaq(program, model, folder, threads, dtype),
    }


def count_temaq(
    program: Path, model: Path, folder: Path, threads: int, dtype: str
) -> list[dict[str, Any]]:
    """What layers ran in each trial but the first one, which includes what comes before it."""
    counts = folder / "counts.json"
    script = Path(__file__).with_name("layer_calls.py").absolute()
    words = [str(program.parent / "python"), "-I", str(script), str(counts), program.name]
    words += temaq_arguments(model, COUNTED_TRIALS, dtype, "counted")
    subprocess.run(
        words, cwd=folder, env=environment(threads), capture_output=True, text=True, check=True
    )
    return [c for c in json.loads(counts.read_text(encoding="utf-8"))[1:] if c]


def temaq_arguments(model: Path, trials: int, dtype: str, workdir: str) -> list[str]:
    """Of a search that neither generates responses in the end nor writes a model."""
    words = [str(model), "--workdir", workdir, "--eval-dtype", dtype]
    words += ["--trials", str(trials), "--harmful-file", "bad_eval.txt"]
    words += ["--harmless-file", "good_eval.txt", "--n-probe", str(PROMPTS), "--verify", "none"]
    words += ["--max-new-tokens", str(TOKENS), "--select", "auto", "--no-report", "--dry-run"]
    return [*words, "--seed", str(SEED), "--output", "out"]


def run_heretic(
    program: Path, model: Path, folder: Path, trials: int, threads: int, dtype: str
) -> dict[str, Any]:
    """Its own search in a pseudo-terminal, ended when its journal holds all trials."""
    write_heretic_config(model, folder, trials, dtype)
    main, worker = pty.openpty()
    process = subprocess.Popen(
        [str(program)], cwd=folder, env=environment(threads), stdin=worker, stdout=worker,
        stderr=worker,
    )  # fmt: skip
    os.set_blocking(main, False)
    seconds: list[float] = []
    give_up = time.monotonic() + LONGEST_SECONDS
    while len(seconds) < trials and process.poll() is None and time.monotonic() < give_up:
        time.sleep(2)
        try:
            os.read(main, 2**20)  # keep the terminal from filling up
        except BlockingIOError:
            pass
        seconds = journal_seconds(folder / "ckpt")
    process.kill()
    if not seconds:
        raise SystemExit("Heretic finished no trial: run it by hand in " + str(folder))
    return {
        "version": "1.4.0",
        "trials": len(seconds),
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "trials_per_minute": 60 / statistics.mean(seconds),
    }


def write_heretic_config(model: Path, folder: Path, trials: int, dtype: str) -> None:
    """The file that it reads in its current folder."""
    prompts = {"good_prompts": "good_train", "bad_prompts": "bad_train"}
    prompts |= {"good_evaluation_prompts": "good_eval", "bad_evaluation_prompts": "bad_eval"}
    config = [f'model = "{model}"', f"n_trials = {trials}", f"n_startup_trials = {trials}"]
    config += [f"batch_size = {PROMPTS}", f"max_response_length = {TOKENS}", 'response_prefix = ""']
    config += [f"seed = {SEED}", 'study_checkpoint_dir = "ckpt"', f'dtypes = ["{dtype}"]']
    for name, file in prompts.items():
        config += [f"[{name}]", f'dataset = "{file}.txt"']
    (folder / "config.toml").write_text("\n".join(config) + "\n", encoding="utf-8")


def journal_seconds(folder: Path) -> list[float]:
    """Durations of finished trials in Optuna journals."""
    starts: list[str] = []
    found = []
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "datetime_start" in entry:
                starts.append(entry["datetime_start"])
            if "datetime_complete" in entry and "trial_id" in entry:
                start = datetime.fromisoformat(starts[entry["trial_id"]])
                end = datetime.fromisoformat(entry["datetime_complete"])
                found.append((end - start).total_seconds())
    return found


def environment(threads: int) -> dict[str, str]:
    """Offline, with as many threads as ours."""
    count = str(threads)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}
