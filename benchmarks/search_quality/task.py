"""What every tool is asked to do, and how a trial of it is chosen. Knows no tool."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

USES = ("train", "eval", "test")
KINDS = ("harmful", "harmless")
Trial = dict[str, Any]
"""number, t_process (s from the process's start to its end), seconds, refusals, n_harmful, kl.

kl_tokens: positions that its KL is over. What a tool does not measure is left out."""


@dataclass(frozen=True)
class Task:
    """One run of one tool on one model; equal for all tools but for the folder."""

    model: Path
    folder: Path
    """Empty; everything that a run writes goes here."""
    prompts: Path
    """Folder of KIND_USE.txt, one prompt a line."""
    minutes: tuple[float, ...]
    """Budgets, ascending, from the start of the process until a candidate is measured."""
    seed: int
    threads: int
    dtype: str
    response_tokens: int
    trials: int
    """At most."""
    target: float
    """Share of refusals that a choice should not exceed, on the tool's own prompts."""
    tolerance: float
    """Share of a budget by which it may be overrun."""
    front: int = 0
    """How many trials of the front are saved beside the choice, at most."""

    def limit(self, minutes: float) -> float:
        """Seconds after which nothing counts for a budget."""
        return minutes * 60 * (1 + self.tolerance)


@dataclass(frozen=True)
class Candidate:
    """A saved trial of the front."""

    candidate: str
    """Folder of the merged model, inside the run's folder."""
    t_process: float
    trial: Trial


@dataclass(frozen=True)
class Choice:
    """The candidate that a tool has at a budget."""

    candidate: str
    """Folder of the merged model, inside the run's folder."""
    t_process: float
    """Seconds from the start of the process until it was measured."""
    note: str = ""
    """What is not as usual, such as that no trial met the target."""
    trial: Trial | None = None
    front: tuple[Candidate, ...] = ()
    """Others of its front, by refusals."""
    front_note: str = ""
    """Why there is none."""


def choose(trials: Sequence[Trial], target: float, within: float) -> tuple[Trial | None, str]:
    """The trial with the least KL among those that meet the target, and a note.

    Where none meets it: the one with the fewest refusals, of those the least KL, and a note that
    says so. None where no trial ended in time.

    Args:
        trials: of a run.
        target: share of refusals.
        within: seconds from the start of the process.
    """
    in_time = [trial for trial in trials if trial["t_process"] <= within]
    if not in_time:
        return None, "no trial ended in time"
    met = [trial for trial in in_time if trial["refusals"] <= target * trial["n_harmful"]]
    if met:
        return min(met, key=lambda trial: trial["kl"]), ""
    fewest = min(in_time, key=lambda trial: (trial["refusals"], trial["kl"]))
    shown = f"{fewest['refusals']}/{fewest['n_harmful']}"
    return fewest, f"no trial met the target: fewest refusals {shown}"


def spread_front(
    trials: Sequence[Trial], count: int, within: float, without: int | None = None
) -> list[Trial]:
    """At most `count` trials of the front of refusals and KL, spread evenly over it by refusals.

    Args:
        trials: of a run.
        count: at most so many.
        within: seconds from the start of the process.
        without: the number of a trial that is left out.

    Returns:
        Fewest refusals first.
    """
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial["refusals"], trial["kl"])):
        if trial["t_process"] <= within and (not front or trial["kl"] < front[-1]["kl"]):
            front.append(trial)
    front = [trial for trial in front if trial["number"] != without]
    if len(front) <= count:
        return front
    low, high = front[0]["refusals"], front[-1]["refusals"]
    chosen: list[Trial] = []
    for place in range(count):
        wanted = low + (high - low) * place / max(1, count - 1)
        others = [trial for trial in front if trial not in chosen]
        chosen.append(min(others, key=lambda trial: abs(trial["refusals"] - wanted)))
    return sorted(chosen, key=lambda trial: trial["refusals"])


def with_front(
    choice: Choice,
    trials: Sequence[Trial],
    task: Task,
    minutes: float,
    export: Callable[[list[Trial]], None],
) -> Choice:
    """A choice with others of its front. Takes no time of the budget.

    Args:
        choice: without a front.
        trials: of the run.
        task: what was asked.
        minutes: the budget.
        export: saves trials as merged models `trialNUMBER` in the run's folder; a SystemExit
            leaves the choice alone, with a note.
    """
    if not choice.candidate:
        return choice
    number = None if choice.trial is None else choice.trial["number"]
    chosen = spread_front(trials, task.front, task.limit(minutes), number)
    try:
        export([t for t in chosen if not (task.folder / f"trial{t['number']}").exists()])
    except SystemExit as error:
        return replace(choice, front_note=f"front not saved: {str(error).splitlines()[-1]}")
    front = (Candidate(f"trial{t['number']}", t["t_process"], t) for t in chosen)
    return replace(choice, front=tuple(front))


def choices_of(
    task: Task, trials: Sequence[Trial], export: Callable[[list[Trial]], None]
) -> dict[float, Choice]:
    """What a tool has at each budget whose trials do not depend on the budget.

    Args:
        task: what was asked.
        trials: of one run, for the longest budget.
        export: saves trials as merged models `trialNUMBER` in the run's folder.
    """
    choices = {}
    for minutes in task.minutes:
        trial, note = choose(trials, task.target, task.limit(minutes))
        if trial is None:
            choices[minutes] = Choice("", task.limit(minutes), note)
            continue
        name = f"trial{trial['number']}"
        if not (task.folder / name).exists():
            export([trial])
        choice = Choice(name, trial["t_process"], note, trial)
        choices[minutes] = with_front(choice, trials, task, minutes, export)
    return choices


def run_facts(process: Process, trials: Sequence[Trial], first: float | None) -> dict[str, Any]:
    """What is written down of a run of such a tool; `first`: seconds until its first trial began.

    Raises:
        SystemExit: it ended before its time without a trial.
    """
    if not trials and not process.killed:
        raise SystemExit(f"it finished no trial:\n{process.tail}")
    return {
        "seconds": process.seconds,
        "setup_seconds": None if first is None else round(first, 1),
        "search_seconds": max((trial["t_process"] for trial in trials), default=None),
        "trials": trials,
    }


def system_text(model: Path) -> str:
    """What the model's chat template says as the system where nothing is given."""
    from transformers import AutoTokenizer

    turn = [{"role": "user", "content": "hello"}]
    text = AutoTokenizer.from_pretrained(model).apply_chat_template(turn, tokenize=False)
    start = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", str(text), re.S)
    return start[1] if start else ""


def environment(threads: int, **more: str) -> dict[str, str]:
    """Offline, with so many threads, without the import path of this process."""
    count = str(threads)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        **inherited,
        **dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"),
        **dict.fromkeys(("HF_HUB_DISABLE_TELEMETRY", "PYTHONUNBUFFERED"), "1"),
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), count),
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def write_builtin_prompts(folder: Path) -> None:
    """The project's own prompts as KIND_USE.txt files."""
    from heretic_kl.prompts import DatasetSpec, load_prompts

    folder.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        for use, split in zip(USES, ("train", "validation", "test"), strict=True):
            prompts = load_prompts(DatasetSpec(f"builtin:{kind}", split))
            lines = [" ".join(prompt.user.split()) for prompt in prompts]
            (folder / f"{kind}_{use}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass
class Process:
    """A program that ran, with its lines and when they came."""

    lines: list[tuple[float, str]]
    returncode: int
    seconds: float
    killed: bool

    @property
    def tail(self) -> str:
        """Its last lines."""
        return "\n".join(line for _, line in self.lines[-15:])


def run_process(
    words: Sequence[str | Path],
    folder: Path,
    env: dict[str, str],
    *,
    log: str,
    seconds: float | None = None,
    ended: Callable[[], bool] = lambda: False,
    terminal: bool = False,
) -> Process:
    """Run a program in a folder until it exits, the time is over, or its work is done.

    Args:
        words: the command.
        folder: its current folder.
        env: its environment.
        log: the name of the file of its lines, in the folder.
        seconds: after which its process group is killed.
        ended: asked every second; True ends it as well.
        terminal: give it a pseudo-terminal, for a program that ends in a question.
    """
    began = time.perf_counter()
    reader, writer = os.openpty() if terminal else os.pipe()
    process = subprocess.Popen(
        [str(word) for word in words],
        cwd=folder,
        env=env,
        stdin=writer if terminal else subprocess.DEVNULL,
        stdout=writer,
        stderr=writer,
        start_new_session=True,
    )
    os.close(writer)
    lines: list[tuple[float, str]] = []
    rest, killed, opened = b"", False, True
    with (
        selectors.DefaultSelector() as selector,
        (folder / log).open("w", encoding="utf-8") as file,
    ):

        def keep(raw: bytes) -> None:
            if raw.strip():
                lines.append((round(time.perf_counter() - began, 2), raw.decode(errors="replace")))
                print(f"{lines[-1][0]:8.2f} {lines[-1][1]}", file=file, flush=True)

        selector.register(reader, selectors.EVENT_READ)
        while opened:
            late = seconds is not None and time.perf_counter() - began > seconds
            if (late or ended()) and not killed and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the group that was started here
                killed = True
            if not selector.select(1.0):
                opened = process.poll() is None
                continue
            try:
                chunk = os.read(reader, 1 << 16)
            except OSError:  # a terminal whose other side is closed
                chunk = b""
            opened = bool(chunk)
            *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
            for line in whole:
                keep(line)
        keep(rest)
    process.wait()
    os.close(reader)
    return Process(lines, process.returncode, round(time.perf_counter() - began, 1), killed)
