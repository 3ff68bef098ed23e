"""A Python process in a real pseudo-terminal: what a person presses and sees."""

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pyte

from heretic_kl import __file__ as package

DOWN, UP, LEFT, ENTER, CTRL_C = "\x1b[B", "\x1b[A", "\x1b[D", "\r", "\x03"
PATIENCE = 120.0
"""Seconds after which what a test waits for is not to be expected any more."""
_OWN_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


class PseudoTerminal:
    """Started at once; a context manager that leaves no process behind."""

    def __init__(self, words: Sequence[str], folder: Path, width: int = 100) -> None:
        self._keyboard, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
        self._screen = _Screen(self._keyboard, width, 40)
        self._stream = pyte.ByteStream(self._screen)
        root = str(Path(package).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _OWN_TERMINAL, *words],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": root, "TERM": "xterm", "OMP_NUM_THREADS": "1"},
        )
        os.close(terminal)

    def __enter__(self) -> "PseudoTerminal":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keyboard)

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait(self, pattern: str) -> str:
        """What is shown as soon as it matches, lines that scrolled away included."""
        deadline = time.monotonic() + PATIENCE
        while not re.search(pattern, self.shown, re.MULTILINE):
            over = not self._read() or time.monotonic() > deadline
            assert not over, f"never showed {pattern!r}, but\n{self.shown}"
        return self.shown

    def wait_for_end(self) -> int:
        """The exit code."""
        while self._read():
            pass
        return self._process.wait(PATIENCE)

    @property
    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self._keyboard)[3] & termios.ECHO)

    @property
    def shown(self) -> str:
        above = [
            "".join(line[column].data for column in range(self._screen.columns))
            for line in self._screen.history.top
        ]
        return "\n".join(line.rstrip() for line in (*above, *self._screen.display)).rstrip("\n")

    def _read(self) -> bool:
        """Feed the screen; False once nobody writes to it any more."""
        content = b""
        if select.select([self._keyboard], [], [], 0.1)[0]:
            with contextlib.suppress(OSError):  # on Linux, after the last process is gone
                content = os.read(self._keyboard, 65536)
            if not content:
                return False
            self._stream.feed(content)
        return True


class _Screen(pyte.HistoryScreen):
    """Answers where the cursor is, as terminals do."""

    def __init__(self, keyboard: int, width: int, height: int) -> None:
        self._keyboard = keyboard
        super().__init__(width, height, history=10_000)

    def write_process_input(self, data: str) -> None:
        os.write(self._keyboard, data.encode())
