"""Which process runs a trial, so that nobody ends a trial that is alive."""

from __future__ import annotations

import os
import platform


def this_process() -> str:
    """Host and process id."""
    return f"{platform.node()}:{os.getpid()}"


def may_be_alive(owner: str | None) -> bool:
    """Whether the process may still run: another host's always, this host's if it exists."""
    host, _, number = (owner or "").rpartition(":")
    if not number.isdigit() or owner == this_process():
        return False
    if host != platform.node():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
