"""Compares searches at equal wall clock: runs every tool alone, judges what it chooses.

    python -m benchmarks.search_quality --model demo=FOLDER --model qwen=FOLDER \
        --heretic PYTHON --temaq PYTHON --minutes 3,6,12 --seeds 0,1,2 \
        --out benchmarks/results/search_quality.json

PYTHON is the interpreter of a peer's own environment; a peer without one is left out. The results
file is written after every run and every judgement, and what it holds is not done again. Last, the
comparison is printed and drawn; `--render` does that alone, from the file.

Beside the choice of each run, `--front N` trials of its own front are saved and judged, which takes
none of its time.

A budget counts from the start of a tool's process until its candidate is measured: it includes
loading, calibration and directions, not the saving of the model (Temaq's does, because it saves
before it ends).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.machine import library_versions, machine_facts
from benchmarks.search_quality import (
    abliterix_runner,
    heretic_kl_runner,
    heretic_runner,
    judge,
    senbonzakura_runner,
    temaq_runner,
)
from benchmarks.search_quality.judging import available_cores, judge_run, measure_floor
from benchmarks.search_quality.results import Results, Run, is_judged, saved_points
from benchmarks.search_quality.table import markdown, write_between_markers
from benchmarks.search_quality.task import KINDS, USES, Choice, Task, environment
from benchmarks.search_quality.task import write_builtin_prompts as write_prompts

OURS = {"heretic-kl": True, "heretic-kl-classic": False}
"""Name -> whether it refines."""
PEERS = {
    "heretic": heretic_runner.run,
    "temaq": temaq_runner.run,
    "abliterix": abliterix_runner.run,
    "senbonzakura": senbonzakura_runner.run,
}
PACKAGES = {"heretic": "heretic-llm", "temaq": "temaq-abliterated"}
"""Name -> package, where that has another name."""


@dataclass(frozen=True)
class Job:
    """One run that is to be done."""

    tool: str
    model: str
    seed: int
    minutes: tuple[float, ...]

    @property
    def folder(self) -> str:
        """Its name in the work folder."""
        return f"{self.model}-{self.tool}-seed{self.seed}-{self.minutes[-1]:g}min"


def main() -> None:
    """Run what is missing, judge it, show it."""
    words = arguments()
    if words.render:
        results = Results.load(words.out if words.out.exists() else words.merge[0])
        results.file = words.out
    else:
        words.work.mkdir(parents=True, exist_ok=True)
        if words.prompts is None:
            words.prompts = words.work / "prompts"
            write_prompts(words.prompts)
        models = {name: Path(path) for name, _, path in (m.partition("=") for m in words.model)}
        hashes = {name: judge.content_hash(folder) for name, folder in models.items()}
        results = Results.read(words.out, facts(words), hashes)
    for file in words.merge:
        results.merge(Results.load(file))
    if not words.render:
        measure(results, models, words)
    show(results, words)


def measure(results: Results, models: dict[str, Path], words: argparse.Namespace) -> None:
    """Run and judge what the results lack; written after every step."""
    for tool in words.again:
        results.forget(tool)
    for name, folder in models.items():
        if words.front and name not in results.floors:
            results.floors[name] = measure_floor(folder, words.work / f"floor-{name}.json", words)
    for job in jobs(words, list(models)):
        run = results.find(job.model, job.tool, job.seed, job.minutes, words.front)
        if run is None or not _can_be_judged(run, words.work / job.folder):
            print(f"run {job.folder}", flush=True)
            reserve = reserved_seconds(job, models[job.model], words, results.runs)
            run = run_job(job, models[job.model], words, reserve)
            results.replace(run)
        if not is_judged(run):
            print(f"judge {job.folder}", flush=True)
            judge_run(run, models[job.model], words.work / job.folder, words)
            results.replace(run)
        # A run without a candidate leaves its log to be read.
        if not words.keep and any(choice["candidate"] for choice in run["choices"].values()):
            shutil.rmtree(words.work / job.folder, ignore_errors=True)


def show(results: Results, words: argparse.Namespace) -> None:
    """Write the results file, the table and the figure."""
    results.write()
    text = markdown(results.runs, results.floors)
    print(text)
    if words.guide is not None:
        write_between_markers(words.guide, words.out.stem, text)
    from benchmarks.search_quality.plot import save  # the only part that needs matplotlib

    save(results.runs, words.figure, results.floors)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search_quality",
        description="Compare searches of edits at equal wall clock.",
    )
    add = parser.add_argument
    add("--model", action="append", default=[], metavar="NAME=FOLDER")
    for peer in PEERS:
        add(f"--{peer}", type=Path, metavar="PYTHON", help=f"of {peer.title()}'s environment")
    add("--tools", type=_words, help=f"of {', '.join([*OURS, *PEERS])} [all there are]")
    add("--minutes", type=_numbers, default=(3.0, 6.0, 12.0), metavar="M,M")
    add("--seeds", type=lambda text: tuple(map(int, text.split(","))), default=(0, 1, 2))
    add("--out", type=Path, default=Path("benchmarks/results/search_quality.json"))
    add("--figure", type=Path, default=Path("docs/figures/search_quality.svg"))
    add("--prompts", type=Path, help="folder of KIND_USE.txt [the built-in sets]")
    add("--harmful", type=Path, default=judge.HERE / "prompts/unseen_harmful.txt")
    add("--harmless", type=Path, default=judge.HERE / "prompts/unseen_harmless.txt")
    add("--threads", type=int, default=1, help="of every tool")
    add("--judge-threads", type=int, default=available_cores(), help="of the judge [all cores]")
    add("--front", type=int, default=5, help="trials of each front to judge beside the pick [5]")
    add("--dtype", default="bfloat16")
    add("--response-tokens", type=int, default=40)
    add("--kl-tokens", type=int, default=16, help="of the judge")
    add("--trials", type=int, default=1000, help="at most, of tools that count them")
    add("--target", type=float, default=0.05, help="share of refusals to choose by")
    add("--tolerance", type=float, default=0.05, help="share of a budget to overrun")
    add("--reserve", type=float, help="seconds of a budget for heretic-kl's setup [measured]")
    add("--heretic-kl-words", default="", help="more of heretic-kl's command line")
    add("--work", type=Path, default=Path(tempfile.gettempdir()) / "search_quality")
    add("--cache", type=Path, help="of the judge's reference sides [in --work]")
    add("--keep", action="store_true", help="keep what runs wrote, saved models included")
    add("--again", type=_words, default=(), metavar="TOOL,TOOL", help="drop and repeat their runs")
    add("--merge", type=_paths, default=(), metavar="FILE,FILE", help="take their runs first")
    add("--render", action="store_true", help="run nothing: table and figure of --out anew")
    add("--guide", type=Path, metavar="FILE.md", help="put the tables between its markers")
    add("--limit", type=int, help="unseen prompts of each kind, for a smoke test")
    words = parser.parse_args()
    _check(parser, words)
    words.cache = words.cache or words.work / "cache"
    return words


def _check(parser: argparse.ArgumentParser, words: argparse.Namespace) -> None:
    if not (words.model or words.render):
        parser.error("--model NAME=FOLDER is missing; only --render does without")
    for name, least in (("front", 0), ("threads", 1), ("judge_threads", 1)):
        if getattr(words, name) < least:
            parser.error(f"--{name.replace('_', '-')}: at least {least}")
    for file in [*words.merge, *([words.out] if words.render and not words.merge else [])]:
        if not file.exists():
            parser.error(f"{file}: no results file")
    if words.guide is not None and not words.guide.exists():
        parser.error(f"--guide {words.guide}: no such file")
    for model in words.model:
        name, separator, folder = model.partition("=")
        if not (name and separator and (Path(folder) / "config.json").exists()):
            parser.error(f"--model {model}: write NAME=FOLDER, of a saved model")
    pythons = {peer: getattr(words, peer) for peer in PEERS}
    there = [*OURS, *(tool for tool, python in pythons.items() if python is not None)]
    words.tools = there if words.tools is None else words.tools
    for tool in words.tools:
        if tool not in there:
            parser.error(f"--tools {tool}: there are {', '.join(there)} (peers need their PYTHON)")
    words.pythons = {tool: Path(os.path.abspath(p)) for tool, p in pythons.items() if p is not None}
    for tool, python in words.pythons.items():
        if not python.exists():
            parser.error(f"--{tool} {python}: no such file")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _paths(text: str) -> tuple[Path, ...]:
    return tuple(map(Path, text.split(",")))


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(sorted(map(float, text.split(","))))


def jobs(words: argparse.Namespace, models: list[str]) -> Iterator[Job]:
    """All runs asked for: one a budget, but one for all budgets of a tool that need not know it."""
    for model in models:
        for seed in words.seeds:
            for tool in words.tools:
                if tool in PEERS and tool != "temaq":
                    yield Job(tool, model, seed, words.minutes)
                else:
                    yield from (Job(tool, model, seed, (m,)) for m in words.minutes)


def facts(words: argparse.Namespace) -> dict[str, Any]:
    """The machine, and what is equal for all runs; those of a file must be equal to continue it."""
    files = {f"{kind}_{use}": words.prompts / f"{kind}_{use}.txt" for kind in KINDS for use in USES}
    files |= {"unseen_harmful": words.harmful, "unseen_harmless": words.harmless}
    return {
        "command": command_line(),
        "versions": library_versions("optuna"),
        "equal": {
            "machine": machine_facts(words.threads),
            "dtype": words.dtype,
            "response_tokens": words.response_tokens,
            "judged_kl_tokens": words.kl_tokens,
            "judged_prompts_limit": words.limit,
            "judge_version": judge.VERSION,
            "refusal_rule_version": judge.RULE_VERSION,
            "target": words.target,
            "tolerance": words.tolerance,
            "trials": words.trials,
            "prompts": {
                name: hashlib.sha256("\n".join(judge.read_prompts(file)).encode()).hexdigest()[:16]
                for name, file in files.items()
            },
        },
    }


def command_line() -> str:
    """How this was called; of paths only the last part."""
    words = []
    for word in sys.argv[1:]:
        name, separator, path = word.rpartition("=")
        words.append(f"{name}{separator}PATH/{Path(path).name}" if "/" in path else word)
    return " ".join(["python -m benchmarks.search_quality", *words])


def reserved_seconds(job: Job, model: Path, words: argparse.Namespace, runs: list[Run]) -> float:
    """What heretic-kl's setup takes on a model: as told, as in earlier runs, or measured now."""
    if job.tool not in OURS:
        return 0.0
    if words.reserve is not None:
        return float(words.reserve)
    before = [r["setup_seconds"] for r in runs if r["model"] == job.model and r["tool"] in OURS]
    if before:
        return statistics.median(before)
    print(f"measure the setup of heretic-kl on {job.model}", flush=True)
    task = _task(job, model, words, f"{job.model}-setup")
    seconds = heretic_kl_runner.setup_seconds(task, words.heretic_kl_words)
    shutil.rmtree(task.folder)
    return round(seconds, 1)


def _task(job: Job, model: Path, words: argparse.Namespace, name: str) -> Task:
    folder = words.work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Task(
        model=model,
        folder=folder,
        prompts=words.prompts,
        minutes=job.minutes,
        seed=job.seed,
        threads=words.threads,
        dtype=words.dtype,
        response_tokens=words.response_tokens,
        trials=words.trials,
        target=words.target,
        tolerance=words.tolerance,
        front=words.front,
    )


def run_job(job: Job, model: Path, words: argparse.Namespace, reserve: float) -> Run:
    """Run one tool, alone on the machine."""
    task = _task(job, model, words, job.folder)
    load = _load()
    figures, choices = run_tool(job, task, words, reserve)
    return {
        "model": job.model,
        "tool": job.tool,
        "seed": job.seed,
        "date": date.today().isoformat(),
        "version": tool_version(job.tool, words),
        "load_before": load,
        "load_after": _load(),
        **figures,
        "front_asked": words.front,
        "choices": {f"{m:g}": _unjudged(choice, words.front) for m, choice in choices.items()},
    }


def _unjudged(choice: Choice, front: int) -> dict[str, Any]:
    """As it is written down."""
    content = {**asdict(choice), "judged": None}
    content["front"] = [{**point, "judged": None} for point in content["front"]]
    if not front:
        del content["front"], content["front_note"]
    return content


def run_tool(
    job: Job, task: Task, words: argparse.Namespace, reserve: float
) -> tuple[dict[str, Any], dict[float, Choice]]:
    """Facts of the run, and a choice a budget."""
    if job.tool in PEERS:
        return PEERS[job.tool](task, words.pythons[job.tool])
    figures, choice = heretic_kl_runner.run(
        task,
        refine=OURS[job.tool],
        reserve=reserve,
        more=words.heretic_kl_words,
    )
    figures |= {"reserve_seconds": reserve, "more_words": words.heretic_kl_words}
    return figures, {job.minutes[0]: choice}


def tool_version(tool: str, words: argparse.Namespace) -> str:
    """Of the package that runs."""
    if tool in OURS:
        return library_versions()["heretic-kl"]
    code = f"from importlib.metadata import version; print(version({PACKAGES.get(tool, tool)!r}))"
    command = [str(words.pythons[tool]), "-c", code]
    done = subprocess.run(command, env=environment(1), capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _can_be_judged(run: Run, folder: Path) -> bool:
    """Whether every candidate that is not judged is still there."""
    missing = (point for point in saved_points(run) if not point["judged"])
    return all((folder / point["candidate"]).exists() for point in missing)


def _load() -> float | None:
    """Mean of running processes over the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if platform.system() != "Windows" else None


if __name__ == "__main__":
    main()
