"""Many workers on one study, with an engine that only sleeps; writes the figures.

    python benchmarks/workers.py

- kills: workers are killed (kill -9) at random moments, alone and three at a time, on a journal
  file and on PostgreSQL. A trial that a worker said was finished must be complete, no parameters
  may be measured twice, and the study must end.
- scaling: trials a minute against the ideal, and the CPU time that a worker spends on a trial
  beside measuring it.
- proxy: 200 workers behind `heretic-kl storage serve`; seconds to get a trial and to tell it.
- front: hypervolume of the front that two workers find against one, at equal trials.
- stored: seconds to open a study of 10,000 trials, to read its front, and to begin a trial.

PostgreSQL has to be installed (Debian: postgresql). Parts run alone with --only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "search"))

import optuna
from machine import library_versions, machine_facts
from servers import free_port, postgresql

from heretic_kl.ablation import EditParameters
from heretic_kl.scoring import Score, ScorerSpec
from heretic_kl.search import SearchSpace, SearchStudy, TrialRecord, open_storage, quiet_optuna

SPACE = SearchSpace(layers=30)
OBJECTIVES = (
    ScorerSpec("refusals", "refusals", "minimize", {}),
    ScorerSpec("teacher_forced_kl", "teacher_forced_kl", "minimize", {}),
)
Place = tuple[str | None, Path, str]
"""What `open_storage` takes."""
RESULTS = Path(__file__).parent / "results" / "workers.json"
FORK = multiprocessing.get_context("fork")
T_95 = 2.776
"""Student's t for 4 degrees of freedom."""


def study_in(storage: optuna.storages.BaseStorage, name: str, **changes: Any) -> SearchStudy:
    """A study of the landscape of `scores_of`."""
    options = {"seed": 0, "startup_trials": 60, **changes}
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


# --- kills --------------------------------------------------------------------------------------


def kills(place: Place, workers: int, count: int, until: int, pause: float) -> dict[str, Any]:
    """Kill workers at random moments, let the others go on, count what is lost or repeated.

    `pause` is the mean time between two kills in seconds: long enough that most workers have
    opened the study.
    """
    chance, log = random.Random(workers), place[1] / f"{place[2]}.finished"
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def work() -> None:
        with open_storage(*place) as storage:
            for record in study_in(storage, place[2]).run(until, sleeping(0.2)):
                os.write(said, f"{record.number}\n".encode())

    children: list[Any] = []
    killed = 0
    while killed < count:
        while len(children) < workers:
            children.append(FORK.Process(target=work))
            children[-1].start()
        time.sleep(chance.expovariate(1 / pause))
        victim = children.pop(chance.randrange(len(children)))
        if victim.is_alive():  # the study may have ended
            victim.kill()
        victim.join()
        killed += victim.exitcode == -signal.SIGKILL
        if victim.exitcode == 0:
            break
    with open_storage(*place) as storage:
        study = study_in(storage, place[2])
        when_killing_ended = study.finished
        list(study.run(until, sleeping(0.0)))
        records = study.records
    for child in children:
        child.join()
    done = complete(records)
    reported = {int(line) for line in log.read_text().split()}
    parameters = {json.dumps(record.parameters, sort_keys=True) for record in done}
    return {
        "kills": killed,
        "workers": workers,
        "finished_when_killing_ended": when_killing_ended,
        "interrupted": sum(record.state == "interrupted" for record in records),
        "complete": len(done),
        "wanted": until,
        "lost": len(reported - {record.number for record in done}),
        "repeated": len(done) - len(parameters),
        "ended": len(done) == until,
    }


# --- scaling ------------------------------------------------------------------------------------


def scaling(place: Place, workers: int, cost: float, rounds: int) -> dict[str, Any]:
    """Trials a minute of several workers that begin together."""
    barrier, spent = FORK.Barrier(workers + 1), FORK.Queue()
    until = workers * rounds

    def work() -> None:
        with open_storage(*place) as storage:
            study = study_in(storage, place[2])
            barrier.wait()
            cpu = time.process_time()
            list(study.run(until, sleeping(cost)))
            spent.put(time.process_time() - cpu)

    children = [FORK.Process(target=work) for _ in range(workers)]
    for child in children:
        child.start()
    barrier.wait()
    start = time.perf_counter()
    cpu = sum(spent.get() for _ in children)
    seconds = time.perf_counter() - start
    for child in children:
        child.join()
    with open_storage(*place) as storage:
        done = len(complete(study_in(storage, place[2]).records))
    return {
        "workers": workers,
        "fake_cost_seconds": cost,
        "trials": done,
        "seconds": round(seconds, 2),
        "trials_a_minute": round(60 * done / seconds, 1),
        "share_of_ideal": round(rounds * cost / seconds, 3),
        "client_cpu_seconds_a_trial": round(cpu / done, 3),
    }


# --- many workers -------------------------------------------------------------------------------


def many(url: str, folder: Path, workers: int, cost: float, rounds: int) -> dict[str, Any]:
    """Seconds to ask and to tell, of many workers in threads of a few processes."""
    processes = 4
    until, figures = workers * rounds, FORK.Queue()

    def work() -> None:
        times: list[tuple[float, float]] = []
        threads = [
            threading.Thread(target=one_of_many, args=(url, folder, cost, until, times))
            for _ in range(workers // processes)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        figures.put(times)

    children = [FORK.Process(target=work) for _ in range(processes)]
    for child in children:
        child.start()
    times = [pair for _ in children for pair in figures.get()]
    for child in children:
        child.join()
    asks, tells = (sorted(column) for column in zip(*times, strict=True))
    code = (
        "import sys, json; from pathlib import Path; sys.path.insert(0, 'benchmarks'); "
        "import workers; print(json.dumps(workers.counted(sys.argv[1], Path(sys.argv[2]))))"
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
        "wanted": until,
        **checked,
    }


def one_of_many(
    url: str, folder: Path, cost: float, until: int, times: list[tuple[float, float]]
) -> None:
    """One worker's life; its first trial, at which all begin together, is not timed."""
    begun: list[float] = []

    def evaluate(edits: Sequence[EditParameters]) -> list[dict[str, Score]]:
        begun.append(time.perf_counter())
        time.sleep(cost * random.uniform(0.2, 1.8))
        begun.append(time.perf_counter())
        return [scores_of(edit) for edit in edits]

    time.sleep(random.uniform(0, cost))
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


@contextlib.contextmanager
def proxy(url: str) -> Iterator[str]:
    """The URL of the real command's proxy in front of a database."""
    port = free_port()
    words = [sys.executable, "-m", "heretic_kl", "storage", "serve", f"--port={port}", "--quiet"]
    server = subprocess.Popen(words, env={**os.environ, "HERETIC_KL_STORAGE": url})
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


# --- front --------------------------------------------------------------------------------------


def front(folder: Path, trials: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Hypervolume below (1 refusal, 0.5 nats) of one worker's front and of two workers'."""
    volumes: dict[int, list[float]] = {1: [], 2: []}
    for seed in seeds:
        for workers, kept in volumes.items():
            place = (None, folder, f"front-{seed}-{workers}")
            threads = [
                threading.Thread(target=search_once, args=(place, trials, seed))
                for _ in range(workers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
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
        study = study_in(storage, place[2], seed=seed, startup_trials=30)
        list(study.run(trials, sleeping(0.1)))


def hypervolume(records: Sequence[TrialRecord]) -> float:
    """Of (refusals, KL) pairs, by the first one, as a share of the whole."""
    volume, limit = 0.0, 0.5
    for refusals, kl in (record.objectives for record in records):
        volume += max(0.0, 1.0 - refusals) * max(0.0, limit - kl)
        limit = min(limit, kl)
    return volume / 0.5


# --- stored -------------------------------------------------------------------------------------


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


def main() -> None:
    """Run the parts, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    quiet_optuna()
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with postgresql() as server, tempfile.TemporaryDirectory() as temporary:
        folder, share = Path(temporary), arguments.kills // 4

        def killing() -> Any:
            return {
                f"{name}, {workers} at a time": kills(
                    (url, folder, f"kills-{name}-{workers}"), workers, share, 300 * workers, pause
                )
                for name, url, pause in (("journal", None, 0.7), ("postgresql", server, 2.0))
                for workers in (1, 3)
            }

        def scaled() -> Any:
            figures = {"journal, 1": scaling((None, folder, "one"), 1, 2.0, 10)}
            figures["journal, 2"] = scaling((None, folder, "two"), 2, 2.0, 10)
            figures["postgresql, 8"] = scaling((server, folder, "eight"), 8, 4.0, 5)
            with proxy(server) as url:
                figures["proxy, 8"] = scaling((url, folder, "eight-proxy"), 8, 4.0, 5)
            return figures

        def behind_proxy() -> Any:
            with proxy(server) as url:
                return many(url, folder, 200, 60.0, 3)

        parts = {
            "kills": killing,
            "scaling": scaled,
            "front": lambda: front(folder, 60, range(5)),
            "stored": lambda: {
                name: stored((url, folder, f"stored-{name}"), 10_000)
                for name, url in (("journal", None), ("postgresql", server))
            },
            "proxy": behind_proxy,
        }
        for name in arguments.only or parts:
            print(f"{name} ...", flush=True)
            result[name] = parts[name]()
            result[name]["cpus"] = len(os.sched_getaffinity(0))
            result[name]["load_of_the_machine"] = round(os.getloadavg()[0], 1)
            result |= {"machine": machine_facts(1), "versions": library_versions("optuna")}
            arguments.out.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps(result[name]), flush=True)


if __name__ == "__main__":
    main()
