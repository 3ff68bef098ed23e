"""TERM ends a command as Ctrl+C does: whatever is held is let go. Decides nothing else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """TERM: `kill`, `scancel`, a machine that is taken away."""


@contextmanager
def stopping_on_term() -> Iterator[None]:
    """Have TERM raise `Terminated` once in the block; a second one changes nothing.

    A process that was started with TERM ignored goes on ignoring it.
    """
    ignored = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
