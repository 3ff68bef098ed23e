"""Progress of a stage, redrawn on a terminal or as plain lines. Decides no wording of results."""

from __future__ import annotations

import time

from rich.console import Console, Group, OverflowMethod, RenderableType
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from heretic_kl.events import StageAdvanced
from heretic_kl.report import duration, to_ascii
from heretic_kl.ui.front_plot import FrontPlot
from heretic_kl.ui.live import ResizableLive
from heretic_kl.ui.terminal import say

NOTES_SHOWN = 20
"""Plain lines: a stage of more steps shows every n-th note, about this many."""
PLAIN_SECONDS = 10.0
"""Plain lines: a stage whose time left is known shows one after so many seconds."""
PLAIN_STATUS_EVERY = 10
"""Plain lines: trials between two lines on how the search stands."""
LOWEST, NARROWEST = 20, 60
"""Rows and columns of a terminal that has room for the plot."""
PLOT_SHARE, MOST_PLOT_LINES, MOST_PLOT_COLUMNS = 0.4, 16, 80
"""Of a terminal's height, and at most."""


def stage_progress(console: Console) -> PlainProgress | LiveProgress:
    """What shows how far a stage is, as it suits the console."""
    lines_can_be_redrawn = console.is_terminal and not console.is_dumb_terminal
    return LiveProgress(console) if lines_can_be_redrawn else PlainProgress(console)


class PlainProgress:
    """Lines without control codes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps: int | None = None
        self._done = 0
        self._said = 0.0

    def start(self, title: str, steps: int | None, plot: FrontPlot | None = None) -> None:
        """Remember the stage; its heading is the observer's, and nothing is plotted."""
        self._steps, self._done = steps, 0
        self._said = time.monotonic()

    def advance(self, event: StageAdvanced) -> None:
        """Print the note, of long stages not every one."""
        self._steps = event.steps or self._steps
        self._done = self._done + 1 if event.done is None else event.done
        count = f"{self._done}/{self._steps} " if self._steps else ""
        if event.done is not None:
            if event.seconds_left is None or time.monotonic() - self._said < PLAIN_SECONDS:
                return
            self._said = time.monotonic()
            say(self._console, f"  {count}{event.note}, {_left(event.seconds_left)}")
            return
        every = max(1, (self._steps or 0) // NOTES_SHOWN)
        if event.note and self._done % every == 0:
            say(self._console, f"  {count}{event.note}")

    def search(
        self, finished: int, wanted: int, seconds_left: float | None, status: list[str]
    ) -> None:
        """Now and then, and at the end, print the time left and how the search stands."""
        if finished % PLAIN_STATUS_EVERY and finished < wanted:
            return
        left = "" if seconds_left is None or finished >= wanted else f"{_left(seconds_left)}; "
        say(self._console, f"  {left}{'; '.join(status)}")

    def stop(self) -> None:
        """Nothing moves."""


class LiveProgress:
    """Lines at the bottom of a terminal, redrawn in place and wiped at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        ascii_only = console.options.ascii_only
        self._worded = to_ascii if ascii_only else str
        self._overflow: OverflowMethod = "crop" if ascii_only else "ellipsis"
        self._spinner = Spinner("line" if ascii_only else "dots")
        self._live: ResizableLive | None = None
        self._plot: FrontPlot | None = None
        self._title = ""
        self._note = ""
        self._steps: int | None = None
        self._done = 0
        self._started = 0.0
        self._deadline: float | None = None
        self._status: list[str] = []

    def start(self, title: str, steps: int | None, plot: FrontPlot | None = None) -> None:
        """Show a spinner, a bar where the number of steps is known, and a plot above them."""
        self.stop()
        self._plot = plot
        self._title, self._note, self._steps, self._done = title, "", steps, 0
        self._deadline, self._status = None, []
        self._started = time.monotonic()
        self._live = ResizableLive(self._console, self._render)
        self._live.start()

    def advance(self, event: StageAdvanced) -> None:
        """Move the bar, show the note and the time left."""
        self._steps = event.steps or self._steps
        self._done = self._done + 1 if event.done is None else event.done
        self._note = event.note
        left = event.seconds_left
        self._deadline = None if left is None else time.monotonic() + left
        self._refresh()

    def search(
        self, finished: int, wanted: int, seconds_left: float | None, status: list[str]
    ) -> None:
        """Move the trials' bar, and show below it how the search stands."""
        if self._live is None:
            self.start("Searching", wanted)
        self._done, self._steps, self._status = finished, wanted, status
        self._deadline = None if seconds_left is None else time.monotonic() + seconds_left
        self._refresh()

    def stop(self) -> None:
        """Wipe the lines. May be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.refresh()

    def _render(self) -> RenderableType:
        row: list[RenderableType] = [self._spinner, self._text(self._caption())]
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, overflow=self._overflow)
        if self._steps:
            grid.add_column(no_wrap=True, overflow=self._overflow)
            grid.add_column(ratio=1)
            grid.add_column(no_wrap=True, overflow=self._overflow)
            done = min(self._done, self._steps)
            row.append(ProgressBar(total=self._steps, completed=done))
            row.append(Text(f"{self._done}/{self._steps}"))
        else:
            grid.add_column(ratio=1, no_wrap=True, overflow=self._overflow)
        grid.add_column(no_wrap=True, overflow=self._overflow)
        row.append(Text(self._time(), style="dim"))
        grid.add_row(*row)
        return Group(*self._plotted(), grid, *(self._text(f"  {line}") for line in self._status))

    def _plotted(self) -> list[Text]:
        """The plot where there is room for it."""
        width, height = self._console.size
        if self._plot is None or height < LOWEST or width < NARROWEST:
            return []
        return self._plot.lines(
            min(width, MOST_PLOT_COLUMNS),
            min(int(PLOT_SHARE * height), MOST_PLOT_LINES),
            ascii_only=self._console.options.ascii_only,
        )

    def _caption(self) -> str:
        return f"{self._title}: {self._note}" if self._note else self._title

    def _text(self, text: str) -> Text:
        return Text(self._worded(text), no_wrap=True, overflow=self._overflow)

    def _time(self) -> str:
        if self._deadline is not None and self._done < (self._steps or 0):
            return _left(max(0.0, self._deadline - time.monotonic()))
        return duration(time.monotonic() - self._started)


def _left(seconds: float) -> str:
    return f"{duration(seconds)} left"
