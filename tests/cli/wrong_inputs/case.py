"""What a wrong input is: the command, what lies around it, and the line and exit code it gets."""

import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Content = str | bytes | Callable[[Path], object]
"""Of a file: text, bytes, or what makes it, given its path."""
ANY = "[...]"
"""Stands for any text in an expected line, for instance what a library says."""
BASE = ("--device", "cpu", "--prompt-set", "builtin")
"""Flags of a run that asks no hub; the page leaves them out."""


@dataclass(frozen=True)
class Wrong:
    """One wrong input."""

    what: str
    """In words, for the page and the name of the test."""
    words: tuple[str, ...]
    """After `heretic-kl`."""
    line: str
    """After `heretic-kl: error: `."""
    code: int = 2
    """1: an error of one line, 2: a wrong setting, 3: no trial meets the pick rule."""
    files: Mapping[str, Content] = field(default_factory=dict)
    """By path in the current folder. There are also `model`, a tiny model, and, where a word says
    `studies`, a folder of that name with a finished study called mine."""
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 120.0
    """Most that it may take."""

    def prepare(self, folder: Path) -> None:
        """Make the files."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    def matches(self, line: str) -> bool:
        """Whether a line on stderr is the one expected."""
        wanted = ".*".join(map(re.escape, self.line.split(ANY)))
        return re.fullmatch(f"heretic-kl: error: {wanted}", line) is not None

    @property
    def shown(self) -> str:
        """As one types it, shortened for the page."""
        words = list(self.words)
        for flag, value in zip(BASE[::2], BASE[1::2], strict=True):
            for place in range(len(words) - 2, -1, -1):
                if words[place : place + 2] == [flag, value]:
                    del words[place : place + 2]
        command = " ".join(map(_quoted, words))
        variables = "".join(f"{name}={_quoted(v)} " for name, v in self.environment.items())
        return f"{variables}heretic-kl {command}".strip()


def _quoted(word: str) -> str:
    if len(word) > 60:
        word = f"{word[:20]}{ANY}"
    return shlex.quote(word) if word.isprintable() else f"${word!r}"
