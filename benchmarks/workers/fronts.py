"""The front that two workers find against one, and a study of many trials."""

from __future__ import annotations

import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from benchmarks.workers.landscape import (
    PROCESSES,
    SPACE,
    Place,
    joined,
    scores_of,
    sleeping,
    study_in,
)
from heretic_kl.ablation import EditParameters
from heretic_kl.scoring import Score
from heretic_kl.search import TrialRecord, open_storage

T_95 = 2.776
"""Student's t for 4 degrees of freedom."""


def front(folder: Path, trials: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Hypervolume below (1 refusal, 0.5 nats) of one worker's front and of two workers'."""
    volumes: dict[int, list[float]] = {1: [], 2: []}
    for seed in seeds:
        for workers, kept in volumes.items():
            place = (None, folder, f"front-{seed}-{workers}")
            children = [
                PROCESSES.Process(target=search_once, args=(place, trials, seed))
                for _ in range(workers)
            ]
            for child in children:
                child.start()
            joined(children)
            with open_storage(*place) as storage:
                kept.append(hypervolume(study_in(storage, place[2]).front))
    differences = [two - one for one, two in zip(volumes[1], volumes[2], strict=True)]
    error = T_95 * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    return {
        "trials": trials,
        "seeds": list(seeds),
        "hypervolume_one_worker": [round(v, 4) for v in volumes[1]],
        "hypervolume_two_workers": [round(v, 4) for v in volumes[2]],
        "difference": round(mean, 4),
        "difference_95_interval": [round(mean - error, 4), round(mean + error, 4)],
    }


def search_once(place: Place, trials: int, seed: int) -> None:
    """One worker's search."""
    with open_storage(*place) as storage:
        study = study_in(storage, place[2], seed=seed)
        list(study.run(trials, sleeping(0.1)))


def hypervolume(records: Sequence[TrialRecord]) -> float:
    """Of (refusals, KL) pairs, by the first one, as a share of the whole."""
    volume, limit = 0.0, 0.5
    for refusals, kl in (record.objectives for record in records):
        volume += max(0.0, 1.0 - refusals) * max(0.0, limit - kl)
        limit = min(limit, kl)
    return volume / 0.5


def stored(place: Place, trials: int) -> dict[str, Any]:
    """Seconds of what a user waits for where a study is large."""
    chance = random.Random(0)
    with open_storage(*place) as storage:
        study = study_in(storage, place[2])
        study_id = storage.get_study_id_from_name(place[2])
        for _ in range(trials):
            storage.create_new_trial(study_id, a_trial(chance))
    start = time.perf_counter()
    with open_storage(*place) as storage:
        study = study_in(storage, place[2])
        opened = time.perf_counter()
        size = len(study.front)
        read = time.perf_counter()
        begun: list[float] = []

        def evaluate(edits: Sequence[EditParameters]) -> list[dict[str, Score]]:
            begun.append(time.perf_counter())
            return [scores_of(edit) for edit in edits]

        next(iter(study.run(trials + 1, evaluate)))
    return {
        "trials": trials,
        "front": size,
        "open_seconds": round(opened - start, 2),
        "front_seconds": round(read - opened, 2),
        "begin_seconds": round(begun[0] - read, 2),
    }


def a_trial(chance: random.Random) -> optuna.trial.FrozenTrial:
    """A finished one, drawn at random."""
    parameters = {
        name: chance.choice(d.choices) if hasattr(d, "choices") else chance.uniform(d.low, d.high)
        for name, d in SPACE.distributions.items()
    }
    scores = scores_of(SPACE.edit(parameters))
    return optuna.create_trial(
        values=[score.value for score in scores.values()],
        params=parameters,
        distributions=SPACE.distributions,
        user_attrs={
            "scores": json.dumps({name: score.to_dict() for name, score in scores.items()}),
            "seconds": 1.0,
        },
    )
