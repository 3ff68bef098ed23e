"""Saves edits of the demo model from one fresh clone, and rebuilds them in another one.

    python benchmarks/reproduce.py [--threads 1] [--other-threads 2]

The second clone has the folders of the saved edits and nothing else of the first: no study, no
settings. Each edit is rebuilt with the threads it was saved with, and with another number of them.
A clone holds what is committed. Results: benchmarks/results/reproduce.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from machine import run_facts

from heretic_kl.demo import ensure_demo_model

ROOT = Path(__file__).parents[1]
TRIALS, STEPS = 3, 8
LIMITS = {"train": 32, "validation": 8, "test": 8}
SEED = 0
VERDICT = re.compile("MATCH|DIFFERS")


def clone(folder: Path) -> Path:
    """A fresh clone of this repository."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    return folder


def heretic_kl(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the program of a clone, in that clone, with nothing of this shell's settings."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("HERETIC_KL_")}
    return subprocess.run(
        [sys.executable, "-m", "heretic_kl", *map(str, words), "--quiet"],
        cwd=home,
        env={**ours, "PYTHONPATH": str(home), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


def save_edits(home: Path, model: Path, edits: Path, threads: int) -> None:
    """A short search: its first trial as a merged model, the refined one as an adapter."""
    search = ["--model", model, "--prompt-set", "builtin", "--kl-tokens", 3, "--seed", SEED]
    search += ["--trials", TRIALS, "--startup-trials", TRIALS, "--test-trials", 1]
    search += ["--refinement.trials", 1, "--refinement.steps", STEPS]
    search += ["--max-response-tokens", 16, "--study-name", "short", "--threads", threads]
    for kind in ("harmful", "harmless", "borderline"):
        for use, limit in LIMITS.items():
            search += [f"--prompts.{kind}.{use}.limit", limit]
    heretic_kl(home, *search, "--pick", "trial=0", "--save", edits / "merged").check_returncode()
    save = ["save", "short", "--trial", refined(home), "--save", edits / "adapter"]
    heretic_kl(home, *save, "--save-as", "lora").check_returncode()


def refined(home: Path) -> int:
    """The number of the trial that the study learned."""
    lines = heretic_kl(home, "trials", "short", "--json").stdout.splitlines()
    records = [event["record"] for event in map(json.loads, lines) if "record" in event]
    edits = ((one["number"], (one["edit"] or {}).get("refinement")) for one in records)
    (number,) = (number for number, learned in edits if learned and learned["of"] is None)
    return number


def facts_of(folder: Path) -> dict:
    """The reproduction file of a saved edit."""
    return json.loads((folder / "reproduce.json").read_text(encoding="utf-8"))


def rebuild(home: Path, model: Path, folder: Path, threads: int) -> dict[str, object]:
    """What `heretic-kl reproduce` says of one edit in a clone."""
    facts = facts_of(folder)
    start = time.perf_counter()
    done = heretic_kl(
        *(home, "reproduce", folder / "reproduce.json", "--model", model),
        *("--threads", threads, "--save", f"{folder.name}-{threads}"),
    )
    lines = done.stdout.splitlines()
    return {
        "edit": "learned" if facts["trial"]["edit"]["refinement"] else "directions",
        "form": facts["form"],
        "threads": threads,
        "exit_code": done.returncode,
        "seconds": round(time.perf_counter() - start),
        "verdict": next(filter(VERDICT.match, lines), ""),
        "lines": lines,
    }


def rebuilt(folder: Path, model: Path, *threads: int) -> Iterator[dict[str, object]]:
    """Each edit, saved from the first clone with the first number of threads, in the second."""
    edits = folder / "edits"
    save_edits(clone(folder / "first"), model, edits, threads[0])
    home = clone(folder / "second")
    for edit in sorted(edits.iterdir()):
        for count in threads:
            yield rebuild(home, model, edit, count)


def table(rebuilds: list[dict]) -> list[str]:
    """Verdicts as lines of a Markdown table."""
    lines = ["| edit | saved as | threads | printed | exit code |", "|---|---|---|---|---|"]
    for one in rebuilds:
        cells = (one["edit"], one["form"], one["threads"], one["verdict"].partition(":")[0])
        lines.append(f"| {' | '.join(map(str, cells))} | {one['exit_code']} |")
    return lines


def main() -> None:
    """Save, rebuild, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--other-threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/reproduce.json")
    arguments = parser.parse_args()
    model = ensure_demo_model().resolve()
    counts = (arguments.threads, arguments.other_threads)
    rebuilds: list[dict] = []
    result = {**run_facts(SEED, arguments.threads, "auto"), "trials": TRIALS, "rebuilds": rebuilds}
    with tempfile.TemporaryDirectory() as folder:
        for one in rebuilt(Path(folder), model, *counts):
            rebuilds.append(one)
            arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            print(table([one])[-1], flush=True)


if __name__ == "__main__":
    main()
