"""Bounds of time and memory around a reader of a file that may be anything."""

import faulthandler
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

from heretic_kl.errors import HereticKLError

SECONDS = 60
BYTES = 2 << 30
"""Of address space, beyond what the process has."""
STATM = Path("/proc/self/statm")


class TooLong(BaseException):
    """Not an `Exception`, which a reader might take for one of the file."""


def _too_long(*_):
    raise TooLong


@contextmanager
def bounded(seconds=SECONDS, lines=False):
    """Reading ends well, or with an error of one line (of several, if `lines`), within bounds.

    What hangs outside Python ends the process, with its traceback.
    """
    before = signal.signal(signal.SIGALRM, _too_long)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(5 * seconds, exit=True)
    if STATM.is_file():
        there = int(STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (there + BYTES, hard))
    try:
        yield
    except HereticKLError as error:
        assert str(error) and (lines or "\n" not in str(error))
        while error is not None:  # what was raised before is no lack of memory
            assert not isinstance(error, MemoryError) and "alloc" not in str(error)
            error = error.__cause__ or error.__context__
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
