"""`--workers N`: more processes of this machine on the study of this one. Searches nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Final, NamedTuple

import torch

from heretic_kl.cli.study.settings import unsaid
from heretic_kl.config import Settings
from heretic_kl.config.keys import ENV_PREFIX
from heretic_kl.events import Notice, Observer
from heretic_kl.run import Session

STOP_SECONDS: Final = 8.0
"""Workers that were asked to stop have this time together, of the ten seconds that all has."""


class Share(NamedTuple):
    """What one of several workers runs on."""

    device: str
    threads: int


def shares(settings: Settings) -> list[Share]:
    """What each worker runs on: GPUs in turn, or an equal part of the CPU's `threads`."""
    gpus = torch.cuda.device_count() if settings.device in ("auto", "cuda") else 0
    if settings.device_map is not None:
        gpus = 0
    count = settings.workers or max(1, gpus)
    threads = max(1, settings.threads // count)
    return [
        Share(f"cuda:{number % gpus}" if gpus and count > 1 else settings.device, threads)
        for number in range(count)
    ]


@contextmanager
def helpers(
    settings: Settings, session: Session, observer: Observer, flags: Sequence[str] = ()
) -> Iterator[None]:
    """Run the other workers while the block searches; they are stopped when it is left.

    Args:
        settings: of all workers together.
        session: the open one of this process: the others join its study.
        observer: told of workers that ended with an error.
        flags: of the others too.
    """
    with ExitStack() as stack:
        running = []
        for share in shares(settings)[1:]:
            errors = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            process = _start(settings, session.parts.study.name, share, errors, flags)
            running.append((process, errors))
        try:
            yield
        finally:
            for process, _ in running:
                process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            for process, errors in running:
                _wait(process, deadline)
                if process.returncode not in (0, 143, 130):
                    observer(Notice(f"a worker ended: {_last_line(errors) or process.returncode}"))


def _start(
    settings: Settings, study: str, share: Share, errors: IO[str], flags: Sequence[str] = ()
) -> subprocess.Popen[bytes]:
    """A worker that takes its settings from the study, and from here those that it may not say."""
    flags = [*flags, f"--study={study}", f"--study-dir={settings.study_dir}", "--quiet"]
    # Without refinement its trials would not be screened by default, and be those of another study.
    flags += ["--no-refine", "--screening" if settings.screens else "--no-screening"]
    flags += ["--workers=1", f"--device={share.device}", f"--threads={share.threads}"]
    flags += unsaid(settings)
    environment = dict(os.environ)
    if settings.storage is not None:  # not on the command line, which every user can read
        environment[f"{ENV_PREFIX}STORAGE"] = settings.storage
    return subprocess.Popen(
        [sys.executable, "-m", "heretic_kl", "worker", *flags],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
    )


def _wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:  # its trial runs again: its lease ends with it
        process.kill()
        process.wait()


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read().strip().splitlines()
    return lines[-1] if lines else ""
