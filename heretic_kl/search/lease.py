"""Who runs a trial, and the sign of life it gives while it does. Ends no trial itself.

A trial is held by a lease: the owner's host and process, and a time that a thread of the owner
renews. A process of the same host is looked up; one of another host is taken for dead once its
lease has expired, however it died.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

OWNER = "owner"
RENEWED = "renewed"
"""Attributes of a trial: who runs it, and when that was last said (seconds since 1970)."""
RENEW_SECONDS = 60.0
EXPIRY_SECONDS = 900.0
"""Clocks of several hosts may differ by minutes."""


def lease_attributes() -> dict[str, Any]:
    """What the owner writes to a trial: itself, and the time."""
    return {OWNER: f"{platform.node()}:{os.getpid()}", RENEWED: time.time()}


def is_abandoned(attributes: Mapping[str, Any], started: float | None = None) -> bool:
    """Whether nobody runs a trial any more.

    Args:
        attributes: the trial's.
        started: when the trial was started, seconds since 1970; counts where the lease has not
            been written yet.
    """
    host, _, process = str(attributes.get(OWNER, "")).rpartition(":")
    if host == platform.node() and process.isdigit() and not _runs(int(process)):
        return True
    renewed = attributes.get(RENEWED, started)
    return renewed is None or time.time() - float(renewed) > EXPIRY_SECONDS


@contextmanager
def renewing(renew: Callable[[], None], seconds: float | None = None) -> Iterator[None]:
    """Call `renew` from a thread every so many seconds until the block is left.

    Args:
        renew: writes the lease of every trial that runs; what it raises is dropped, since the
            next call may succeed and a lost lease costs one trial.
        seconds: between two calls; `RENEW_SECONDS` by default.
    """
    pause = RENEW_SECONDS if seconds is None else seconds
    over = threading.Event()

    def loop() -> None:
        while not over.wait(pause):
            try:
                renew()
            except Exception:  # noqa: S112 (each storage raises its own)
                continue

    thread = threading.Thread(target=loop, name="trial lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _runs(process: int) -> bool:
    """Whether a process of this host runs, and is not this one, which starts trials anew."""
    if process == os.getpid():
        return False
    if platform.system() == "Windows":
        return True  # there is no harmless signal there: the lease decides
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
