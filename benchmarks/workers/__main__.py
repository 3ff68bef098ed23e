"""Many workers on one study, with an engine that only sleeps; writes the figures.

    python -m benchmarks.workers

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
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "search"))

from servers import free_port, postgresql

from benchmarks.machine import library_versions, machine_facts
from benchmarks.workers.fronts import front, stored
from benchmarks.workers.kills import kills
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
