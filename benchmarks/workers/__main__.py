"""Many workers on one study; writes the figures of docs/workers.md.

    OMP_NUM_THREADS=1 python -m benchmarks.workers [--only PART ...]

Parts, each in a process of its own, all but `real` with an engine that only sleeps:

- kills: workers are killed (kill -9) at random moments, alone and three at a time, on a journal
  file and on PostgreSQL. A trial that a worker said was finished must be complete, no parameters
  may be measured twice, every study must end, and half of the kills must hit a running trial:
  where fewer do, the exit code is 1.
- front: hypervolume of the front that two workers find against one, at equal trials.
- stored: seconds to open a study of 10,000 trials, to read its front, and to begin a trial.
- proxy: 200 workers behind `heretic-kl storage serve`; seconds to get a trial and to tell it.
- scaling: trials a minute of 8 workers against the ideal, and the CPU time that a worker spends on
  a trial beside measuring it; drawn at random, and by the sampler.
- real: trials a minute of the program itself on a model, two workers against one, in turns, and
  the same ratio of plain matrix products, which is what the machine allows.

PostgreSQL has to be installed (Debian: postgresql). The load of the machine is in the file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "search"))

from servers import free_port, postgresql

from benchmarks.machine import library_versions, machine_facts
from benchmarks.workers.fronts import front, stored
from benchmarks.workers.kills import kills
from benchmarks.workers.real_trials import two_against_one
from benchmarks.workers.table import few_hits, lines
from benchmarks.workers.throughput import many, scaling
from heretic_kl.search import quiet_optuna

RESULTS = Path(__file__).parents[1] / "results" / "workers.json"


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


def all_kills(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A quarter of the kills in each of four ways."""
    share, figures = arguments.kills // 4, {}
    with postgresql() as server:
        for name, url in (("journal", None), ("postgresql", server)):
            for workers in (1, 3):
                place = (url, folder, f"kills-{name}-{workers}")
                figures[f"{name}, {workers}"] = kills(place, workers, share, 100 * workers)
    return figures


def all_scaling(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Eight workers on a database and on the proxy in front of it, and the journal beside them."""
    figures: dict[str, Any] = {}
    with postgresql() as server, proxy(server) as served:
        for kind, startup in (("at random", 10**6), ("by the sampler", 11)):
            for name, url in (("journal", None), ("postgresql", server), ("proxy", served)):
                place = (url, folder, f"{name}-{startup}")
                figures[f"{name}, {kind}"] = scaling(place, 8, 4.0, 6, startup)
    return figures


def behind_proxy(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """200 workers."""
    with postgresql() as server, proxy(server) as url:
        return many(url, folder, 200, 60.0, 3)


def all_stored(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Large studies."""
    with postgresql() as server:
        return {
            name: stored((url, folder, f"stored-{name}"), 10_000)
            for name, url in (("journal", None), ("postgresql", server))
        }


PARTS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "kills": all_kills,
    "front": lambda folder, _: front(folder, 30, range(5)),
    "stored": all_stored,
    "proxy": behind_proxy,
    "scaling": all_scaling,
    "real": lambda folder, _: two_against_one(folder, 24, 3),
}


def main() -> None:
    """Run each part in a process of its own, or the only one here; write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    if len(arguments.only) > 1:
        same = [f"--out={arguments.out}", f"--kills={arguments.kills}", "--only"]
        failed = []
        for name in arguments.only:
            words = [sys.executable, "-m", "benchmarks.workers", *same, name]
            if subprocess.run(words).returncode:
                failed.append(name)
        if failed:
            sys.exit(f"failed: {', '.join(failed)}")
        return
    quiet_optuna()
    (name,) = arguments.only
    before, start = os.getloadavg()[1], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        figures = PARTS[name](Path(folder), arguments)
    result = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    result[name] = {
        "command": f"python -m benchmarks.workers --only {name}",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine_facts(1),
        "versions": library_versions("optuna", "sqlalchemy", "psycopg", "grpcio"),
        "load_average_before_and_after": [round(before, 1), round(os.getloadavg()[1], 1)],
        "seconds": round(time.perf_counter() - start),
        "figures": figures,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(lines({name: result[name]})), flush=True)
    if name == "kills" and (few := few_hits(figures)):
        sys.exit(f"fewer than half of the kills hit a running trial: {'; '.join(few)}")


if __name__ == "__main__":
    main()
