"""Workers killed at random moments: what is lost, and what is measured twice.

A kill during start-up finds nothing to lose. So most kills wait until the worker has begun a trial.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from benchmarks.workers.landscape import (
    PROCESSES,
    Place,
    complete,
    joined,
    sleeping,
    study_in,
)
from heretic_kl.ablation import EditParameters
from heretic_kl.scoring import Score
from heretic_kl.search import open_storage
from heretic_kl.search.trials import ABANDONED

AT_START = 0.2
"""Share of kills that aim at a worker's start-up, evenly over its time."""
TRIAL_SECONDS = 0.4
LATER_TRIALS = 4.0
"""All other kills fall evenly into the time of so many trials, from the worker's first one on."""


class Worker:
    """A process that runs trials; says what it has finished before it goes on."""

    def __init__(self, place: Place, until: int, log: Path, seconds: float) -> None:
        self._started, self._first = time.monotonic(), PROCESSES.RawValue("d", 0.0)
        arguments = (place, until, log, seconds, self._first)
        self.process = PROCESSES.Process(target=work, args=arguments)
        self.process.start()

    @property
    def begun(self) -> bool:
        """Whether it has begun a trial."""
        return bool(self._first.value)

    def start_up(self) -> float | None:
        """Wait for its first trial; the seconds until then, or None where it ended without one."""
        while not self.begun and self.process.exitcode is None:
            time.sleep(0.002)
        return self._first.value - self._started if self.begun else None


def work(place: Place, until: int, log: Path, seconds: float, first: Any) -> None:
    """What a `Worker` does; `first` is when its first trial began, in seconds."""
    measure, said = sleeping(seconds), os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def evaluate(edits: Sequence[EditParameters]) -> list[dict[str, Score]]:
        first.value = first.value or time.monotonic()
        return measure(edits)

    with open_storage(*place) as storage:
        for record in study_in(storage, place[2], startup_trials=until).run(until, evaluate):
            os.write(said, f"{record.number}\n".encode())


def kills(
    place: Place,
    workers: int,
    count: int,
    until: int,
    *,
    seconds: float = TRIAL_SECONDS,
    later: float = LATER_TRIALS,
) -> dict[str, Any]:
    """Kill workers at random moments, over as many studies as that takes; count the losses.

    Args:
        place: of the studies; the name is their beginning.
        workers: that run at a time.
        count: kills in all.
        until: trials of each study.
        seconds: of a trial.
        later: see `LATER_TRIALS`.
    """
    chance, sums, studies = random.Random(workers), Counter[str](), 0
    while sums["kills"] < count:
        url, folder, name = place
        one = (url, folder, f"{name}-{studies}")
        left = count - sums["kills"]
        sums.update(one_study(one, workers, left, until, chance, seconds, later))
        studies += 1
    return {"workers": workers, "studies": studies, "trials_of_each": until, **sums}


def one_study(
    place: Place,
    workers: int,
    most: int,
    until: int,
    chance: random.Random,
    seconds: float,
    later: float,
) -> dict[str, int]:
    """One study through at most so many kills, to its end."""
    log = place[1] / f"{place[2]}.finished"
    log.touch()
    crew: list[Worker] = []
    killed, at_start = 0, 0
    start_up: float | None = None
    while killed < most:
        while len(crew) < workers:
            crew.append(Worker(place, until, log, seconds))
        if start_up is not None and chance.random() < AT_START:
            victim = crew[-1]  # the one that was just started
            time.sleep(chance.uniform(0.0, start_up))
        else:
            victim = chance.choice(crew)
            start_up = victim.start_up() or start_up
            time.sleep(chance.uniform(0.0, later * seconds))
        crew.remove(victim)
        victim.process.kill()
        joined([victim.process])
        if victim.process.exitcode == 0:  # the study had ended
            break
        if victim.process.exitcode != -signal.SIGKILL:
            raise RuntimeError("a worker failed by itself; see its traceback")
        killed += 1
        at_start += not victim.begun
    joined([worker.process for worker in crew])
    return {"kills": killed, "at_start": at_start, **losses(place, until, log)}


def losses(place: Place, until: int, log: Path) -> dict[str, int]:
    """Run a study to its end, here; what its workers lost."""
    with open_storage(*place) as storage:
        study = study_in(storage, place[2], startup_trials=until)
        list(study.run(until, sleeping(0.0)))
        records = study.records
        stored = optuna.load_study(study_name=place[2], storage=storage).get_trials(deepcopy=False)
    done = [record for record in records if record.state in ("complete", "failed")]
    reported = {int(line) for line in log.read_text().split()}
    parameters = {json.dumps(record.parameters, sort_keys=True) for record in done}
    return {
        "in_a_trial": sum(bool(trial.user_attrs.get(ABANDONED)) for trial in stored),
        "interrupted": sum(record.state == "interrupted" for record in records),
        "complete": len(complete(records)),
        "given_up": len(done) - len(complete(records)),  # as several workers died over them
        "lost": len(reported - {record.number for record in done}),
        "repeated": len(done) - len(parameters),
        "not_ended": int(len(done) != until),
    }
