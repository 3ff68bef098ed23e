"""Who is told what a command does: a person, by lines and tables, or a program, by JSON lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from heretic_kl.errors import ConfigError, printable
from heretic_kl.files import check_writable, expanded
from heretic_kl.ranks import is_first

if TYPE_CHECKING:
    from heretic_kl.ui.event_lines import ConsoleObserver
    from heretic_kl.ui.json_lines import JsonLinesObserver

JSON_FLAG = "--json"
STDOUT = Path("-")
"""The file that stands for stdout."""


@dataclass
class Output:
    """What stdout is for."""

    as_json: bool = False
    """For a program, which reads JSON lines."""


_output: ContextVar[Output] = ContextVar("_output", default=Output())  # noqa: B039 (never changed)


def write(text: str) -> None:
    """A line of a command's output on stdout, as it is."""
    sys.stdout.write(f"{text}\n")


def write_error(text: str) -> None:
    """Lines on stderr, without control characters."""
    sys.stderr.write(f"{printable(text)}\n")


def take_json_flag(words: Sequence[str], *, may_name_file: bool) -> tuple[list[str], bool]:
    """Split `--json` from the other words of a command line, and whether it is there.

    Where `may_name_file`, `--json FILE` is another flag and stays.
    """
    rest: list[str] = []
    for word, following in zip_longest(words, words[1:]):
        bare = following is None or (following.startswith("-") and following != "-")
        if word != JSON_FLAG or (may_name_file and not bare):
            rest.append(word)
    return rest, len(rest) < len(words)


def check_json_file(target: Path | None) -> None:
    """Refuse the FILE of `--json FILE` before anything is measured.

    Raises:
        ConfigError: its folder is not there.
    """
    if target not in (None, STDOUT) and not target.absolute().parent.is_dir():
        raise ConfigError(f"--json {target}: there is no folder {str(target.parent)!r}")


def check_new_files(sources: Iterable[str], targets: Iterable[tuple[str, Path | None]]) -> None:
    """Refuse files that cannot be written, or that would replace what is read or written.

    Args:
        sources: names of models, prompts and files that are read.
        targets: flags and their files; None is no file.

    Raises:
        ConfigError: which, and why.
    """
    taken = {expanded(n).resolve(): "is read" for n in sources if expanded(n).is_file()}
    for flag, path in targets:
        if path is None:
            continue
        if path.resolve() in taken:
            raise ConfigError(f"{flag} {path}: that file {taken[path.resolve()]} already")
        taken[path.resolve()] = f"is where {flag} goes"
        if path.is_dir():
            raise ConfigError(f"{flag} {path}: a folder of that name exists; name a file")
        try:
            check_writable(path.parent)
        except OSError as error:
            raise ConfigError(f"{flag} {path}: cannot be written: {error.strerror}") from error


@contextmanager
def json_lines() -> Iterator[Output]:
    """Have commands that run meanwhile write what `Output` says."""
    output = Output()
    token = _output.set(output)
    try:
        yield output
    finally:
        _output.reset(token)


def writes_json() -> bool:
    """Whether stdout is for a program."""
    return _output.get().as_json


@contextmanager
def observing(*, quiet: bool = False) -> Iterator[ConsoleObserver | JsonLinesObserver]:
    """Whoever is told the events of this command, until the block is left."""
    observer: ConsoleObserver | JsonLinesObserver
    if writes_json() or not is_first():  # whose stdout nobody reads
        from heretic_kl.ui.json_lines import JsonLinesObserver

        observer = JsonLinesObserver(sys.stdout)
    else:
        from heretic_kl.ui.event_lines import ConsoleObserver
        from heretic_kl.ui.terminal import make_console

        observer = ConsoleObserver(quiet=quiet, results=make_console())
    with observer:
        yield observer
