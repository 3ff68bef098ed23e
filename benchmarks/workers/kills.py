"""Workers killed at random moments: what is lost, and what is measured twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.workers.landscape import (
    PROCESSES,
    Place,
    complete,
    joined,
    sleeping,
    study_in,
)
from heretic_kl.search import open_storage


def kills(place: Place, workers: int, count: int, until: int, pause: float) -> dict[str, Any]:
    """Kill workers at random moments, over as many studies as that takes; count the losses.

    Args:
        place: of the studies; the name is their beginning.
        workers: that run at a time.
        count: kills in all.
        until: trials of each study.
        pause: mean seconds between two kills: long enough that most workers have opened the study.
    """
    chance, sums, studies = random.Random(workers), Counter[str](), 0
    while sums["kills"] < count:
        url, folder, name = place
        one = (url, folder, f"{name}-{studies}")
        sums.update(one_study(one, workers, count - sums["kills"], until, pause, chance))
        studies += 1
    return {"workers": workers, "studies": studies, "trials_of_each": until, **sums}


def work(place: Place, until: int, log: Path) -> None:
    """A worker; says what it has finished before it goes on."""
    said = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with open_storage(*place) as storage:
        for record in study_in(storage, place[2], startup_trials=until).run(until, sleeping(0.2)):
            os.write(said, f"{record.number}\n".encode())


def one_study(
    place: Place, workers: int, most: int, until: int, pause: float, chance: random.Random
) -> dict[str, int]:
    """One study through at most so many kills, to its end."""
    log = place[1] / f"{place[2]}.finished"
    log.touch()
    children: list[Any] = []
    killed = 0
    while killed < most:
        while len(children) < workers:
            children.append(PROCESSES.Process(target=work, args=(place, until, log)))
            children[-1].start()
        time.sleep(chance.expovariate(1 / pause))
        victim = children.pop(chance.randrange(len(children)))
        victim.kill()
        joined([victim])
        killed += victim.exitcode == -signal.SIGKILL
        if victim.exitcode == 0:  # the study had ended
            break
    joined(children)
    with open_storage(*place) as storage:
        study = study_in(storage, place[2], startup_trials=until)
        list(study.run(until, sleeping(0.0)))
        records = study.records
    done = complete(records)
    reported = {int(line) for line in log.read_text().split()}
    parameters = {json.dumps(record.parameters, sort_keys=True) for record in done}
    return {
        "kills": killed,
        "interrupted": sum(record.state == "interrupted" for record in records),
        "complete": len(done),
        "lost": len(reported - {record.number for record in done}),
        "repeated": len(done) - len(parameters),
        "not_ended": int(len(done) != until),
    }
