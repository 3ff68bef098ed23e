"""One or two texts beside each other, whole or while they grow. Knows no models."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Final, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.text import Text

from heretic_kl.errors import printable
from heretic_kl.ui.live import ResizableLive

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
    pairs = list(zip(headings, texts, strict=True))
    for group in [pairs] if fit_beside(console) else [[pair] for pair in pairs]:
        width = _column_width(console, len(group))
        columns = [_wrapped(console, Text(printable(text)), width) for _, text in group]
        titles = _titles(console, [heading for heading, _ in group], width)
        for row in (*titles, *_beside(console, columns, width)):
            console.print(row)


class GrowingColumns:
    """One text that grows, or two beside each other; a context manager.

    A row is printed for good once nothing that is added can change it. Rows below it are redrawn at
    the bottom of the terminal.
    """

    def __init__(self, console: Console, headings: Sequence[Heading]) -> None:
        self._console = console
        self._headings = headings
        self._texts = ["" for _ in headings]
        self._growing = [True for _ in headings]
        self._printed = 0  # rows of the texts
        self._width = _column_width(console, len(headings))
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
        if _column_width(self._console, len(self._texts)) != self._width:
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
        self._printed = 0
        self._width = _column_width(self._console, len(self._texts))

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


def _column_width(console: Console, columns: int) -> int:
    return max(1, (console.width - (columns - 1) * len(_gap(console))) // columns)


def _gap(console: Console) -> str:
    return " | " if console.options.ascii_only else " │ "


def _titles(console: Console, headings: Sequence[Heading], width: int) -> list[Text]:
    titles = [Text(f"{heading.title}:", style=heading.style) for heading in headings]
    return _beside(console, [_wrapped(console, title, width) for title in titles], width)


def _beside(console: Console, columns: Sequence[Sequence[Text]], width: int) -> list[Text]:
    """Rows that hold a line of each column."""
    gap, rows = Text(_gap(console), style="dim"), []
    for *left, last in zip_longest(*columns, fillvalue=Text()):
        row = Text(no_wrap=True)
        for line in left:
            row.append_text(line).append(" " * max(0, width - line.cell_len)).append_text(gap)
        rows.append(row.append_text(last))
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
