"""Runs `heretic-kl demo` in an empty folder and keeps what it measured.

    python benchmarks/demo.py [--repeats 1] [--keep FOLDER] [--out benchmarks/results/demo.json]

The run's own figures (refusals, KL with errors, before and after) are taken from the reproduction
file it writes; seconds are of the whole command, model building aside if it is cached already.
`--keep` leaves the last run in a folder, for `benchmarks/report.py` and `screenshots.py`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from machine import machine_facts

SCORES = ("refusals", "teacher_forced_kl", "false_refusals")


def run_once(folder: Path, threads: int) -> tuple[float, dict]:
    """One run; seconds, and the content of reproduce.json."""
    words = [sys.executable, "-m", "heretic_kl", "demo", "--threads", str(threads), "--quiet"]
    start = time.perf_counter()
    subprocess.run(words, cwd=folder, check=True)
    seconds = time.perf_counter() - start
    facts = (folder / "heretic-kl-demo" / "model" / "reproduce.json").read_text(encoding="utf-8")
    return seconds, json.loads(facts)


def main() -> None:
    """Run, summarize, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep the last run in this new folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/demo.json")
    arguments = parser.parse_args()
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
    runs = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run_once(Path(folder), arguments.threads))
            if arguments.keep and len(runs) == arguments.repeats:
                shutil.copytree(folder, arguments.keep, dirs_exist_ok=True)
    facts = runs[-1][1]
    kept = ("value", "standard_error", "interval", "text")
    result = {
        "command": "heretic-kl demo",
        "date": date.today().isoformat(),
        "seed": facts["seed"],
        "machine": machine_facts(arguments.threads),
        "versions": facts["versions"],
        "seconds": statistics.median(seconds for seconds, _ in runs),
        "repeats": arguments.repeats,
        "trials": facts["trial"]["of"],
        "picked": {key: facts["trial"][key] for key in ("number", "pick_rule", "parameters")},
        "test_scores": {
            name: {
                which: {key: score[key] for key in kept}
                for which, score in facts["test_scores"][name].items()
                if score is not None
            }
            for name in SCORES
        },
        "measurement": facts["measurement"],
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
