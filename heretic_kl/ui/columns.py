"""Two texts beside each other on a terminal, whole or while they grow. Knows no models."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Final, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.text import Text

from heretic_kl.ui.live import ResizableLive
from heretic_kl.ui.terminal import printable

NARROWEST: Final = 72
"""Columns of a terminal from which two texts stand beside each other."""
SECONDS_BETWEEN_FRAMES: Final = 0.1


class Heading(NamedTuple):
    """What stands above a column."""

    title: str
    style: str = ""


def fit_beside(console: Console) -> bool:
    """Whether the console has room for two columns."""
    return console.width >= NARROWEST


def print_columns(console: Console, headings: Sequence[Heading], texts: Sequence[str]) -> None:
    """Texts beside each other where there is room, else below one another."""
    if len(texts) < 2 or not fit_beside(console):
        for heading, text in zip(headings, texts, strict=True):
            console.print(Text(f"{heading.title}:", style=heading.style))
            console.print(Text(printable(text)))
        return
    width = _column_width(console)
    for row in (*_titles(console, headings, width), *_rows(console, texts, width)):
        console.print(row)


class GrowingColumns:
    """Two texts that grow beside each other; a context manager.

    A row is printed for good once nothing that is added can change it. Rows below it are redrawn at
    the bottom of the terminal.
    """

    def __init__(self, console: Console, headings: Sequence[Heading]) -> None:
        self._console = console
        self._headings = headings
        self._texts = ["" for _ in headings]
        self._growing = [True for _ in headings]
        self._printed = 0  # rows of the texts
        self._width = _column_width(console)
        self._drawn_at = 0.0
        self._live = ResizableLive(console, self._pending, refreshing=False)

    def __enter__(self) -> GrowingColumns:
        for row in _titles(self._console, self._headings, self._width):
            self._console.print(row)
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._growing = [False for _ in self._growing]
        rows, _ = self._laid_out()
        pending, self._printed = rows[self._printed :], len(rows)
        self._live.stop()
        for row in pending:
            self._console.print(row)

    def add(self, place: int, piece: str) -> None:
        """Let a column grow."""
        self._texts[place] += printable(piece)
        self._draw()

    def end(self, place: int) -> None:
        """A column grows no more."""
        self._growing[place] = False
        self._draw()

    def _draw(self) -> None:
        if _column_width(self._console) != self._width:
            self._start_anew()
        rows, final = self._laid_out()
        done = rows[self._printed : final]
        self._printed = max(self._printed, final)
        if done:
            self._console.print(Group(*done))
        elif time.monotonic() - self._drawn_at < SECONDS_BETWEEN_FRAMES:
            return
        else:
            self._live.refresh()
        self._drawn_at = time.monotonic()

    def _start_anew(self) -> None:
        """From the first row that is not printed yet, rows have the terminal's new width."""
        columns = self._columns()
        self._texts = [
            _without_beginning(text, column[: self._printed])
            for text, column in zip(self._texts, columns, strict=True)
        ]
        self._printed, self._width = 0, _column_width(self._console)

    def _pending(self) -> RenderableType:
        """What is redrawn: the rows that may still change, the last ones where they are many."""
        rows, _ = self._laid_out()
        most = max(1, self._console.height - 2)
        return Group(*rows[self._printed :][-most:])

    def _columns(self) -> list[list[Text]]:
        return [_wrapped(self._console, Text(text), self._width) for text in self._texts]

    def _laid_out(self) -> tuple[list[Text], int]:
        """All rows of the texts, and how many of them nothing can change any more."""
        columns = self._columns()
        rows = _beside(self._console, columns, self._width)
        # Only the last line of a text that grows may change.
        final = [
            max(0, len(column) - 1)
            for column, grows in zip(columns, self._growing, strict=True)
            if grows
        ]
        return rows, min(final, default=len(rows))


def _column_width(console: Console) -> int:
    return max(1, (console.width - len(_gap(console))) // 2)


def _gap(console: Console) -> str:
    return " | " if console.options.ascii_only else " │ "


def _titles(console: Console, headings: Sequence[Heading], width: int) -> list[Text]:
    titles = [Text(f"{heading.title}:", style=heading.style) for heading in headings]
    return _beside(console, [_wrapped(console, title, width) for title in titles], width)


def _rows(console: Console, texts: Sequence[str], width: int) -> list[Text]:
    columns = [_wrapped(console, Text(printable(text)), width) for text in texts]
    return _beside(console, columns, width)


def _beside(console: Console, columns: Sequence[Sequence[Text]], width: int) -> list[Text]:
    """Rows that hold a line of the first column and one of the second."""
    gap, rows = Text(_gap(console), style="dim"), []
    for left, right in zip_longest(*columns, fillvalue=Text()):
        blanks = Text(" " * max(0, width - left.cell_len))
        rows.append(Text.assemble(left, blanks, gap, right, no_wrap=True))
    return rows


def _wrapped(console: Console, text: Text, width: int) -> list[Text]:
    lines = list(text.wrap(console, width)) if text.plain else []
    for line in lines:
        line.rstrip()
    return lines


def _without_beginning(text: str, lines: Sequence[Text]) -> str:
    """What follows lines that a text was wrapped to, which lack some of its blanks alone."""
    letters = sum(len("".join(line.plain.split())) for line in lines)
    for index, character in enumerate(text):
        if not letters:
            return re.sub(r"^[ \t]*\n?", "", text[index:])
        letters -= not character.isspace()
    return ""
