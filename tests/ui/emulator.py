"""A terminal in memory: what a person would see of what a console writes."""

from io import StringIO

import pyte
from rich.console import Console


class Emulator(StringIO):
    """A file whose text is obeyed by an emulated terminal; lines that scroll away are kept."""

    encoding = "utf-8"  # type: ignore[assignment]

    def __init__(self, width: int = 80, height: int = 24) -> None:
        super().__init__()
        self._open(width, height)
        self.console = Console(
            file=self,
            force_terminal=True,
            width=width,
            height=height,
            highlight=False,
            _environ={"TERM": "xterm"},
        )

    def _open(self, width: int, height: int) -> None:
        self.screen = pyte.HistoryScreen(width, height, history=10_000)
        self.screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        self._stream.feed(text)
        return len(text)

    @property
    def lines(self) -> list[str]:
        """All of them, those above the screen first, without blanks at their ends."""
        above = [
            "".join(line[column].data for column in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        lines = [line.rstrip() for line in (*above, *self.screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def resize(self, width: int) -> None:
        """As terminals do that wrap lines anew."""
        lines, height = self.lines, self.screen.lines
        self._open(width, height)
        wrapped = [
            line[start : start + width]
            for line in lines
            for start in range(0, max(1, len(line)), width)
        ]
        self.write("\n".join(wrapped))
        self.console.width = width
