"""Trials a minute of the real program on a model, by one worker and by two with a thread each."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.trial import FrozenTrial

from heretic_kl.search import read_study
from heretic_kl.search.storage.lease import LEASE

PROMPTS = 24
SETTINGS = """
startup_trials = 11
refine = false
racing = false
test_trials = 0
device = "cpu"
dtype = "float32"
max_response_tokens = 16
batch_size = 16
prompt_set = "builtin"
response_prefix = ""
directions.by_response = false
scorers.teacher_forced_kl.settings.set_aside_refused = false
"""
"""No trial is stopped early: all of them cost alike."""


def two_against_one(folder: Path, trials: int, rounds: int) -> dict[str, Any]:
    """One worker and two in turns, so that what else runs on the machine hits both alike."""
    model = a_model(folder)
    rates: dict[int, list[float]] = {1: [], 2: []}
    ceiling: list[float] = []
    for number in range(rounds):
        for workers, measured in rates.items():
            measured.append(rate(folder, model, f"real-{number}-{workers}", workers, trials))
        ceiling.append(matrix_rate(2) / matrix_rate(1))
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {
        "model": "random Llama, 384 wide, 8 layers, float32, one thread a worker",
        "trials_a_study": trials,
        "trials_a_minute_one_worker": [round(value, 1) for value in rates[1]],
        "trials_a_minute_two_workers": [round(value, 1) for value in rates[2]],
        "ratios": [round(value, 2) for value in ratios],
        "ratio": round(fmean(ratios), 2),
        "ratio_of_plain_matrix_products": round(fmean(ceiling), 2),
    }


def a_model(folder: Path) -> Path:
    """A random model that is large enough for its passes to take nearly all the time."""
    from heretic_kl.testing import save_tiny_model, tiny_llama

    lines = [
        f'prompts.{kind}.{use} = {{source = "builtin:{kind}", split = "{use}[:{PROMPTS}]"}}'
        for kind in ("harmful", "harmless", "borderline")
        for use in ("train", "validation", "test")
    ]
    (folder / "config.toml").write_text("\n".join([SETTINGS, *lines]))
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    return save_tiny_model(folder / "model", tiny_llama(**sizes))


def rate(folder: Path, model: Path, name: str, workers: int, trials: int) -> float:
    """Trials a minute while all workers run."""
    words = [sys.executable, "-m", "heretic_kl", f"--model={model}", f"--study-name={name}"]
    words += [f"--study-dir={folder}", f"--trials={trials}", f"--workers={workers}"]
    words += [f"--threads={workers}", f"--config={folder / 'config.toml'}", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(words, env=environment, check=True, stdout=subprocess.DEVNULL)
    return together(read_study(name, folder).trials)


def together(trials: Sequence[FrozenTrial]) -> float:
    """Trials a minute from when the last worker began its first one; parts of trials count."""
    spans = [
        (t.user_attrs[LEASE]["owner"], *(time.timestamp() for time in times))
        for t in trials
        if None not in (times := (t.datetime_start, t.datetime_complete)) and t.values
    ]
    firsts: dict[str, float] = {}
    for owner, start, _ in spans:
        firsts[owner] = min(start, firsts.get(owner, start))
    begin = max(firsts.values())
    end = min(max(e for o, _, e in spans if o == owner) for owner in firsts)
    done = sum(max(0.0, min(e, end) - max(s, begin)) / (e - s) for _, s, e in spans)
    return 60 * done / (end - begin)


def matrix_rate(processes: int) -> float:
    """Matrix products a second of so many processes with a thread each: what the machine allows."""
    context = multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(processes), context.Queue()
    children = [context.Process(target=multiply, args=(barrier, counts)) for _ in range(processes)]
    for child in children:
        child.start()
    total = sum(counts.get(timeout=300) for _ in children)
    for child in children:
        child.join(60)
    return float(total)


def multiply(barrier: Any, counts: Any) -> None:
    """One of the processes."""
    import torch

    torch.set_num_threads(1)
    left = torch.randn(384, 384)
    barrier.wait(300)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < 5:
        left @ left
        count += 1
    counts.put(count / (time.perf_counter() - start))
