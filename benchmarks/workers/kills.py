"""Workers killed at random moments: what is lost, and what is measured twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from typing import Any

from benchmarks.workers.landscape import FORK, Place, complete, sleeping, study_in
from heretic_kl.search import open_storage


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
