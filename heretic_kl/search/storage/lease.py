"""Who holds a trial, and the sign of life it gives meanwhile. Ends no trial itself.

A lease is an attribute of a running trial: the owner's host and process, and a time that a thread
of the owner renews. A process of this host is looked up. Any other owner is taken for dead once
its lease stands still for `EXPIRY_SECONDS` by the watcher's own clock, so that clocks of several
hosts may differ and jump.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

LEASE = "lease"
"""Attribute of a trial: `{"owner": HOST:PROCESS, "renewed": seconds since 1970}`."""
RENEW_SECONDS = 30.0
EXPIRY_SECONDS = 150.0
OLD_SECONDS = 900.0
"""Another host's lease of this age is over at first sight, whatever clocks differ by."""


def lease_attributes() -> dict[str, Any]:
    """What the owner writes to a trial: itself, and the time."""
    owner = f"{_host()}:{_process(os.getpid())}"
    return {LEASE: {"owner": owner, "renewed": time.time()}}


class Watch:
    """Tells whose owner is gone; remembers since when it has seen a lease stand still.

    While the storage cannot be reached nobody can renew a lease: that time does not count.
    """

    def __init__(self, storage: BaseStorage | None = None) -> None:
        self._storage, self._interruptions = storage, 0
        self._seen: dict[int, tuple[float, float]] = {}

    def abandoned(self, trial: FrozenTrial) -> bool:
        """Whether nobody runs a running trial any more."""
        interruptions = getattr(self._storage, "interruptions", 0)
        if interruptions != self._interruptions:
            self._interruptions = interruptions
            self._seen.clear()
        lease = trial.user_attrs.get(LEASE, {})
        host, _, process = str(lease.get("owner", "")).rpartition(":")
        if host == _host() and not _runs(process):
            return True
        started = trial.datetime_start  # counts until the lease has been written
        renewed = float(lease.get("renewed", started.timestamp() if started else 0.0))
        if host != _host() and time.time() - renewed > OLD_SECONDS:
            return True
        last, since = self._seen.get(trial._trial_id, (None, 0.0))
        if renewed != last:
            self._seen[trial._trial_id] = renewed, time.monotonic()
            return False
        return time.monotonic() - since > EXPIRY_SECONDS


class Heartbeat:
    """Renews the leases of all trials that this process holds, from a thread while there are any.

    What renewing raises is dropped: the next attempt may succeed, and a lost lease costs one trial.
    """

    def __init__(self, storage: BaseStorage) -> None:
        self._storage = storage
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._idle = threading.Event()

    def add(self, trial_id: int) -> None:
        """Renew this trial's lease from now on."""
        with self._lock:
            self._held.add(trial_id)
            if len(self._held) == 1:
                self._idle = threading.Event()
                arguments = (self._idle, RENEW_SECONDS)
                threading.Thread(
                    target=self._loop, args=arguments, name="trial leases", daemon=True
                ).start()

    def remove(self, trial_id: int) -> None:
        """Renew it no longer."""
        with self._lock:
            self._held.discard(trial_id)
            if not self._held:
                self._idle.set()

    def _loop(self, idle: threading.Event, pause: float) -> None:
        while not idle.wait(pause):
            with self._lock:
                held = tuple(self._held)
            for trial_id in held:
                try:
                    for name, value in lease_attributes().items():
                        self._storage.set_trial_user_attr(trial_id, name, value)
                except Exception:  # noqa: S112 (each storage raises its own)
                    continue


@cache
def _host() -> str:
    """This machine since it was started, and the namespace of its process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:  # not Linux
        return platform.node()
    return f"{platform.node()}/{boot}.{namespace}"


def _process(number: int) -> str:
    """A process and, on Linux, when it was started: its number may be given to another one."""
    try:
        status = Path(f"/proc/{number}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return str(number)
    state, *fields = status.rpartition(")")[2].split()
    return "" if state in "ZX" else f"{number}.{fields[18]}"


def _runs(process: str) -> bool:
    """Whether a process of this host still runs."""
    number = process.partition(".")[0]
    if not number.isdigit() or platform.system() == "Windows":
        return True  # Windows has no harmless signal: the lease decides
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # another user's
    return "." not in process or _process(int(number)) == process
