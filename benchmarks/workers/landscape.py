"""A study of made-up scores, and an engine that only sleeps."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna

from heretic_kl.ablation import EditParameters
from heretic_kl.scoring import Score, ScorerSpec
from heretic_kl.search import SearchSpace, SearchStudy, TrialRecord, quiet_optuna

SPACE = SearchSpace(layers=30)
OBJECTIVES = (
    ScorerSpec("refusals", "refusals", "minimize", {}),
    ScorerSpec("teacher_forced_kl", "teacher_forced_kl", "minimize", {}),
)
Place = tuple[str | None, Path, str]
"""What `open_storage` takes."""
PROCESSES = multiprocessing.get_context("forkserver")
"""Forks from a process that has imported, and has run neither threads nor gRPC nor a sampler."""
PROCESSES.set_forkserver_preload([f"benchmarks.workers.{n}" for n in ("kills", "throughput")])
JOIN_SECONDS = 600.0


def joined(children: Sequence[Any]) -> None:
    """Wait for processes.

    Raises:
        TimeoutError: one does not end.
    """
    for child in children:
        child.join(JOIN_SECONDS)
        if child.exitcode is None:
            child.kill()
            raise TimeoutError(f"a worker does not end within {JOIN_SECONDS:g} s")


def study_in(storage: optuna.storages.BaseStorage, name: str, **changes: Any) -> SearchStudy:
    """A study of the landscape of `scores_of`."""
    quiet_optuna()
    options = {"seed": 0, "startup_trials": 11, **changes}
    return SearchStudy(storage, name, fingerprint={}, space=SPACE, objectives=OBJECTIVES, **options)


def scores_of(edit: EditParameters) -> dict[str, Score]:
    """A landscape: strength removes refusals best near the middle, and costs everywhere."""
    effect, cost = 0.0, 0.0
    for component, kernel in edit.kernels.items():
        strength = kernel.peak_weight * (0.3 + kernel.reach / 29)
        centre = 18.0 if component == "attention" else 15.0
        effect += strength * math.exp(-(((kernel.peak_position - centre) / 8) ** 2))
        cost += strength**2 * (1 + abs(kernel.floor_weight - 0.5))
    position = 18.0 if edit.direction_position is None else edit.direction_position
    effect *= math.exp(-(((position - 19.0) / 10) ** 2))
    refusals, kl = math.exp(-1.5 * effect), 0.05 * cost
    return {"refusals": Score(refusals, "x"), "teacher_forced_kl": Score(kl, "x")}


def sleeping(seconds: float) -> Callable[[Sequence[EditParameters]], list[dict[str, Score]]]:
    """An engine that takes so long for any edits."""

    def evaluate(edits: Sequence[EditParameters]) -> list[dict[str, Score]]:
        time.sleep(seconds)
        return [scores_of(edit) for edit in edits]

    return evaluate


def complete(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that were measured."""
    return [record for record in records if record.state == "complete"]
