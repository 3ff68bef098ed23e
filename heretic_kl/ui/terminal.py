"""Consoles that write to any terminal, file or encoding. Knows nothing about models or trials."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.segment import Segment
from rich.text import Text

from heretic_kl.errors import printable
from heretic_kl.report import to_ascii

try:
    import termios
except ImportError:  # Windows, which echoes nothing that nobody reads
    termios = None  # type: ignore[assignment]


class _EncodableStream:
    """A text stream that replaces what its encoding lacks, where the stream itself would raise."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            ascii_text = re.sub(r"[^\x00-\x7f]", lambda match: self._likeness(match.group()), text)
            text = ascii_text.encode(self.encoding, "replace").decode(self.encoding)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def _likeness(self, character: str) -> str:
        try:
            character.encode(self.encoding)
        except UnicodeEncodeError:
            return to_ascii(character)
        return character


class _PipeConsole(Console):
    """Prints no control characters of a text; its own codes are segments of other kinds.

    Leaves a broken pipe to the caller, where rich would end the process.
    """

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)

    def on_broken_pipe(self) -> None:
        raise  # called while the BrokenPipeError is being handled


def make_console(*, stderr: bool = False, stream: IO[str] | None = None) -> Console:
    """A console on stdout, stderr or another stream.

    What is no terminal gets no control codes, whatever FORCE_COLOR and the like say: a log is
    read by people and programs.
    """
    if stream is None:
        stream = sys.stderr if stderr else sys.stdout
    return _PipeConsole(
        file=cast(IO[str], _EncodableStream(stream)),
        force_terminal=None if stream.isatty() else False,
        highlight=False,
        markup=False,
        emoji=False,
    )


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is: no markup in it is obeyed; on terminals, long lines wrap at words."""
    if console.options.ascii_only:
        text = to_ascii(text)
    if not console.is_terminal:
        console.print(Text(text), soft_wrap=True)
        return
    indent = len(text) - len(text.lstrip(" "))
    body = Text(text[indent:], style=style or "")
    console.print(Padding(body, (0, 0, 0, min(indent, 8)), expand=False))


@contextmanager
def unechoed() -> Iterator[None]:
    """Keys typed meanwhile wait unseen for whoever reads next; Ctrl+C interrupts as ever.

    An echo would stand amid lines that are redrawn.
    """
    echoes = _set_echo(False)
    try:
        yield
    finally:
        if echoes:
            _set_echo(True)


def drop_unread(descriptor: int) -> bool:
    """Drop what was typed and not read yet; whether the descriptor is a terminal's."""
    if termios is None or not os.isatty(descriptor):
        return False
    termios.tcflush(descriptor, termios.TCIFLUSH)
    return True


def _set_echo(on: bool) -> bool:
    """Whether the terminal at stdin echoed; False where there is none, or another job has it."""
    if termios is None or sys.stdin is None:
        return False
    try:
        terminal = sys.stdin.fileno()
        if os.tcgetpgrp(terminal) != os.getpgrp():
            return False  # the system would stop a background job that changes the terminal
        modes = termios.tcgetattr(terminal)
        before = bool(modes[3] & termios.ECHO)
        modes[3] = modes[3] | termios.ECHO if on else modes[3] & ~termios.ECHO
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
    except (OSError, ValueError, termios.error):  # ValueError: stdin is closed
        return False
    return before
