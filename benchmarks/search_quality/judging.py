"""Runs the judge on what runs have saved, in processes of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.search_quality.heretic_kl_runner import CHECKOUT
from benchmarks.search_quality.results import Run, saved_points
from benchmarks.search_quality.task import environment
from benchmarks.search_quality.volume import DEFAULT_FLOOR


def available_cores() -> int:
    """That this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def judge_run(run: Run, reference: Path, folder: Path, words: argparse.Namespace) -> None:
    """Judge every candidate of a run that is not judged, each model once."""
    judged: dict[str, Any] = {}
    choices = list(run["choices"].values())
    for point in saved_points(run):
        name = point["candidate"]
        if point["judged"]:
            continue
        if name not in judged:
            judged[name] = judge_one(reference, folder / name, folder / f"{name}.json", words)
        point["judged"] = judged[name]
        # By prompt only for the choice: the table averages them over seeds.
        if not any(point is choice for choice in choices):
            point["judged"] = {k: v for k, v in judged[name].items() if k != "kl_per_prompt"}


def judge_one(
    reference: Path, candidate: Path, out: Path, words: argparse.Namespace
) -> dict[str, Any]:
    """Figures of one saved model."""
    return _call(reference, ["--candidate", candidate], out, words)


def measure_floor(reference: Path, out: Path, words: argparse.Namespace) -> float:
    """Noise floor of a model's KL, nats: what rounding to the runs' dtype costs."""
    figures = _call(reference, ["--floor", words.dtype], out, words)
    return max(DEFAULT_FLOOR, float(figures["kl"]["mean"]))


def _call(
    reference: Path, asked: list[str | Path], out: Path, words: argparse.Namespace
) -> dict[str, Any]:
    command: list[Any] = [sys.executable, "-m", "benchmarks.search_quality.judge"]
    command += ["--reference", reference, *asked, "--cache", words.cache, "--out", out]
    command += ["--harmful", words.harmful, "--harmless", words.harmless]
    command += ["--response-tokens", words.response_tokens, "--kl-tokens", words.kl_tokens]
    command += ["--threads", words.judge_threads]
    command += ["--limit", words.limit] if words.limit else []
    env = environment(words.judge_threads, PYTHONPATH=str(CHECKOUT))
    done = subprocess.run([str(w) for w in command], env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{asked[1]} cannot be judged:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return figures
