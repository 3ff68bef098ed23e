"""Lines at the bottom of a terminal, redrawn in place, also after it was resized. Decides none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment

from heretic_kl.ui.terminal import unechoed

REFRESHES_PER_SECOND = 4


class ResizableLive(Live):
    """A transient `rich.live.Live` that leaves nothing behind when the terminal is narrowed.

    Terminals wrap lines that no longer fit. rich goes up by as many lines as it drew, which are
    then too few, and copies of the frame would stay. On a terminal that cuts lines instead of
    wrapping them, a few lines above the frame are erased too. Keys typed meanwhile are not echoed.

    Args:
        console: a terminal.
        draw: makes a frame.
        refreshing: redraw by itself, a few times a second.
    """

    def __init__(
        self, console: Console, draw: Callable[[], RenderableType], *, refreshing: bool = True
    ) -> None:
        self._frame = _Frame(draw)
        self._echo_off = ExitStack()
        super().__init__(
            self._frame,
            console=console,
            auto_refresh=refreshing,
            refresh_per_second=REFRESHES_PER_SECOND,
            transient=True,
            # Where stdout is a file, what is printed must go there and not above the frame.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )

    def start(self, refresh: bool = False) -> None:
        """Draw the first frame."""
        self._echo_off.enter_context(unechoed())
        super().start(refresh)

    def stop(self) -> None:
        """Wipe the last frame. May be called twice."""
        try:
            super().stop()
        finally:
            self._echo_off.close()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Erase what the last frame became, then print, then draw the frame again."""
        width = max(1, self.console.width)
        wrapped = sum(max(0, -(-length // width) - 1) for length in self._frame.lengths)
        up = ((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1))
        return [Control(*up * wrapped), *super().process_renderables(renderables)]


@dataclass
class _Frame:
    """What is drawn, without blanks at the ends of lines: they would be wrapped too."""

    draw: Callable[[], RenderableType]
    lengths: list[int] = field(default_factory=list)
    """Of the lines of the last frame, in cells."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self.draw(), options, pad=False)
        lines = [_without_blanks(line) for line in lines]
        self.lengths = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()


def _without_blanks(line: list[Segment]) -> list[Segment]:
    kept_segments = list(line)
    while kept_segments and not kept_segments[-1].text.strip():
        kept_segments.pop()
    if kept_segments:
        last = kept_segments.pop()
        kept_segments.append(Segment(last.text.rstrip(" "), last.style))
    return kept_segments
