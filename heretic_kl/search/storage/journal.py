"""A journal file that several processes append to, and that survives whichever of them dies.

Differs from Optuna's own in three ways. The system's lock on the file itself guards an append, so
that the lock of a killed process is gone with it. What a killed process or a full disk left of a
line is cut off before the next append, under the same lock. A line that could not be written
whole is cut off at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TAIL_BYTES = 1 << 16


class SharedJournalFile(JournalFileBackend):
    """Optuna's journal file, safe to share.

    Args:
        path: of the file, made if missing.

    Raises:
        OSError: it cannot be opened for appending.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), JournalFileOpenLock(str(path)))
        self._path = path
        with path.open("ab"):
            pass

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append whole lines, or nothing; they are on the disk when this returns.

        Raises:
            OSError: the disk is full, or the file is gone.
        """
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        with self._path.open("rb+", buffering=0) as file, locked(file, self._path):
            end = _whole_lines(file)
            if end < file.seek(0, os.SEEK_END):
                file.truncate(end)
            file.seek(end)
            try:
                _write(file, lines.encode())
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold a lock file beside a path; other processes remove it when it is 30 s old."""
    lock = JournalFileOpenLock(str(path))
    lock.acquire()
    try:
        yield
    finally:
        with suppress(RuntimeError):  # removed meanwhile
            lock.release()


@contextmanager
def locked(file: BinaryIO, path: Path) -> Iterator[None]:
    """Nobody else appends to the file of this path meanwhile; the lock ends with the process.

    Where the file system has no locks: a lock file.
    """
    try:
        if fcntl is None:
            raise OSError("no locks")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        with lock_file(path):
            yield
        return
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _whole_lines(file: BinaryIO) -> int:
    """Where the last whole line ends, in bytes."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - _TAIL_BYTES)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _write(file: BinaryIO, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]
