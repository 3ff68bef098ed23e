"""Trials a minute of several workers, and how long many wait for a trial."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workers.landscape import (
    JOIN_SECONDS,
    PROCESSES,
    Place,
    complete,
    joined,
    scores_of,
    sleeping,
    study_in,
)
from heretic_kl.ablation import EditParameters
from heretic_kl.scoring import Score
from heretic_kl.search import open_storage


def scaling(place: Place, workers: int, cost: float, rounds: int, startup: int) -> dict[str, Any]:
    """Trials a minute of several workers that begin together and wait `cost` seconds a trial.

    `startup` trials are drawn at random; the Gaussian process draws the others.
    """
    barrier, spent = PROCESSES.Barrier(workers + 1), PROCESSES.Queue()
    until = workers * rounds
    arguments = (place, until, cost, startup, barrier, spent)
    children = [PROCESSES.Process(target=timed, args=arguments) for _ in range(workers)]
    for child in children:
        child.start()
    barrier.wait(JOIN_SECONDS)
    start = time.perf_counter()
    cpu = sum(spent.get(timeout=JOIN_SECONDS) for _ in children)
    seconds = time.perf_counter() - start
    joined(children)
    with open_storage(*place) as storage:
        done = len(complete(study_in(storage, place[2]).records))
    return {
        "workers": workers,
        "fake_cost_seconds": cost,
        "trials": done,
        "drawn_at_random": startup,
        "seconds": round(seconds, 2),
        "trials_a_minute": round(60 * done / seconds, 1),
        "share_of_ideal": round(rounds * cost / seconds, 3),
        "client_cpu_seconds_a_trial": round(cpu / done, 3),
    }


def timed(place: Place, until: int, cost: float, startup: int, barrier: Any, spent: Any) -> None:
    """One of the workers; tells the CPU seconds that it spent."""
    with open_storage(*place) as storage:
        study = study_in(storage, place[2], startup_trials=startup)
        barrier.wait(JOIN_SECONDS)
        cpu = time.process_time()
        list(study.run(until, sleeping(cost)))
        spent.put(time.process_time() - cpu)


def many(url: str, folder: Path, workers: int, cost: float, rounds: int) -> dict[str, Any]:
    """Seconds to ask and to tell, of many workers in threads of a few processes.

    They share the machine with the proxy and its database: their CPU time is in the figures.
    """
    processes = 4
    until, figures = workers * rounds, PROCESSES.Queue()
    arguments = (url, folder, workers // processes, cost, until, figures)
    seeds = range(processes)
    children = [PROCESSES.Process(target=some_of_many, args=(*arguments, n)) for n in seeds]
    for child in children:
        child.start()
    results = [figures.get(timeout=JOIN_SECONDS) for _ in children]
    joined(children)
    times = [pair for pairs, _ in results for pair in pairs]
    cpu = sum(seconds for _, seconds in results)
    asks, tells = (sorted(column) for column in zip(*times, strict=True))
    code = (
        "import sys, json; from pathlib import Path; "
        "from benchmarks.workers.throughput import counted; "
        "print(json.dumps(counted(sys.argv[1], Path(sys.argv[2]))))"
    )
    words = [sys.executable, "-c", code, url, str(folder)]
    checked = json.loads(subprocess.run(words, capture_output=True, check=True).stdout)
    return {
        "workers": workers,
        "fake_cost_seconds": cost,
        "trials_timed": len(times),
        "ask_seconds_median": round(statistics.median(asks), 3),
        "ask_seconds_95th": round(asks[int(0.95 * len(asks))], 3),
        "tell_seconds_median": round(statistics.median(tells), 3),
        "tell_seconds_95th": round(tells[int(0.95 * len(tells))], 3),
        "client_cpu_seconds_a_trial": round(cpu / until, 3),
        "wanted": until,
        **checked,
    }


def some_of_many(
    url: str, folder: Path, count: int, cost: float, until: int, figures: Any, seed: int
) -> None:
    """One process's share of the workers, a thread each; tells their waits and its CPU seconds."""
    times: list[tuple[float, float]] = []
    seeds = [100 * seed + number for number in range(count)]
    arguments = (url, folder, cost, until, times)
    threads = [threading.Thread(target=one_of_many, args=(*arguments, n)) for n in seeds]
    cpu = time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures.put((times, time.process_time() - cpu))


def one_of_many(
    url: str, folder: Path, cost: float, until: int, times: list[tuple[float, float]], seed: int
) -> None:
    """One worker's life; it starts at random within `cost` seconds. Its first ask is not timed."""
    chance, begun = random.Random(seed), list[float]()

    def evaluate(edits: Sequence[EditParameters]) -> list[dict[str, Score]]:
        begun.append(time.perf_counter())
        time.sleep(cost * chance.uniform(0.2, 1.8))
        begun.append(time.perf_counter())
        return [scores_of(edit) for edit in edits]

    time.sleep(chance.uniform(0, cost))
    with open_storage(url, folder, "many") as storage:
        told = None
        for _ in study_in(storage, "many", startup_trials=10**6).run(until, evaluate):
            if not begun:
                continue  # another worker's
            now = time.perf_counter()
            if told is not None:
                times.append((begun[0] - told, now - begun[1]))
            told = now
            begun.clear()


def counted(url: str, folder: Path) -> dict[str, Any]:
    """What is in a study of many workers; in a process of its own, since gRPC does not fork."""
    with open_storage(url, folder, "many") as storage:
        done = complete(study_in(storage, "many").records)
    parameters = {json.dumps(record.parameters, sort_keys=True) for record in done}
    return {"complete": len(done), "repeated": len(done) - len(parameters)}
