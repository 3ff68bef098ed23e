"""A conversation with an edited model beside the original. Runs no model: it asks the session."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Final, Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heretic_kl.errors import HereticKLError
from heretic_kl.search import TrialRecord
from heretic_kl.ui.asking import ask_line
from heretic_kl.ui.terminal import printable, say

RESPONSE_TOKENS: Final = 400
HELP: Final = (
    "commands: /original, /edited, /both (who responds), /history (side by side), /reset, /exit; "
    "Ctrl+C stops a response. Each side remembers what it answered itself."
)
SIDE_BY_SIDE_WIDTH: Final = 100
"""Columns of a terminal from which two responses stand beside each other in the history."""


class ChatSession(Protocol):
    """The part of a session that a conversation needs."""

    def stream_response(
        self, record: TrialRecord | None, messages: Sequence[Mapping[str, str]], max_tokens: int
    ) -> Generator[str, None, None]:
        """Pieces of a response's text, to be closed; a record of None is the unedited model."""
        ...


@dataclass
class Speaker:
    """One of the two models, with a conversation of its own."""

    name: str
    record: TrialRecord | None
    """None: the unedited model."""
    style: str
    messages: list[dict[str, str]] = field(default_factory=list)


@dataclass
class Turn:
    """What the person said, and who responded what."""

    line: str
    responses: dict[str, str] = field(default_factory=dict)
    """By the speaker's name; without those that failed."""


def chat(
    session: ChatSession,
    record: TrialRecord,
    console: Console,
    *,
    max_tokens: int = RESPONSE_TOKENS,
) -> None:
    """Read lines and stream both responses to each, until the person leaves.

    The edit of the trial `record` is in force on one side.
    """
    original = Speaker("original", None, "cyan")
    edited = Speaker(f"edited, trial {record.number}", record, "green")
    who = {"/original": [original], "/edited": [edited], "/both": [original, edited]}
    speakers, turns = who["/both"], list[Turn]()
    say(console, HELP, "dim")
    while (line := ask_line("you", ">")) is not None:
        command = line.strip().lower()
        if not command:
            continue
        if command == "/exit":
            return
        if command == "/reset":
            original.messages.clear()
            edited.messages.clear()
            turns.clear()
            say(console, "both conversations start anew", "dim")
        elif command == "/history":
            _show_history(turns, [original, edited], console)
        elif command in who:
            speakers = who[command]
            say(console, f"responding: {' and '.join(s.name for s in speakers)}", "dim")
        elif command.startswith("/"):
            say(console, f"unknown command {command.split()[0]}; {HELP}", "yellow")
        else:
            turns.append(Turn(line.strip()))
            for speaker in speakers:
                response = _response(session, speaker, line.strip(), console, max_tokens)
                if response is not None:
                    turns[-1].responses[speaker.name] = response


def _show_history(turns: Sequence[Turn], speakers: Sequence[Speaker], console: Console) -> None:
    """Every turn; two responses beside each other where the terminal is wide enough."""
    if not turns:
        say(console, "nothing was said yet", "dim")
    for turn in turns:
        say(console, f"> {turn.line}", "bold")
        present = [s for s in speakers if s.name in turn.responses]
        beside = len(present) > 1 and console.width >= SIDE_BY_SIDE_WIDTH
        for group in [present] if beside else [[speaker] for speaker in present]:
            grid = Table.grid(expand=True, padding=(0, 2))
            for _ in group:
                grid.add_column(ratio=1)
            grid.add_row(*(Text(f"{s.name}:", style=f"bold {s.style}") for s in group))
            grid.add_row(*(Text(printable(turn.responses[s.name])) for s in group))
            console.print(grid)


def _response(
    session: ChatSession, speaker: Speaker, line: str, console: Console, max_tokens: int
) -> str | None:
    """Stream one response, keep and return it; what was stopped as far as it came; None: failed."""
    say(console, f"{speaker.name}:", f"bold {speaker.style}")
    messages = [*speaker.messages, {"role": "user", "content": line}]
    pieces: list[str] = []
    writer = _WordWriter(console)
    stopped = False
    try:
        # Closed at once, whatever happens: while it is open its edit is in force.
        with closing(session.stream_response(speaker.record, messages, max_tokens)) as stream:
            for piece in stream:
                pieces.append(piece)
                writer.write(piece)
    except KeyboardInterrupt:
        stopped = True
    except HereticKLError as error:
        writer.finish()
        say(console, f"error: {error}", "red")
        return None
    writer.finish()
    response = "".join(pieces)
    if stopped:
        say(console, "(stopped)", "dim")
    elif not response.strip():
        say(console, "(empty response)", "dim")
    speaker.messages = [*messages, {"role": "assistant", "content": response}]
    return response


class _WordWriter:
    """Writes pieces of text as they come, with line breaks between words on terminals."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._width = console.width if console.is_terminal else None
        self._column = 0
        self._word = ""
        self._blank = True

    def write(self, piece: str) -> None:
        """Write what is certain: the last word may go on in the next piece."""
        for character in printable(piece):
            if not character.isspace():
                self._word += character
                if self._width and cell_len(self._word) >= self._width:
                    self._end_word()
                continue
            self._end_word()
            if character == "\n":
                self._emit("\n")
                self._column = 0
            elif self._width is None or self._column < self._width:
                self._emit(" ")
                self._column += 1

    def finish(self) -> None:
        """Write the rest and end the line."""
        self._end_word()
        if self._column or self._blank:
            self._emit("\n")

    def _end_word(self) -> None:
        length = cell_len(self._word)
        if not length:
            return
        if self._width and self._column and self._column + length > self._width:
            self._emit("\n")
            self._column = 0
        self._emit(self._word)
        self._column += length
        self._word = ""

    def _emit(self, text: str) -> None:
        self._blank = False
        self._console.print(Text(text), end="", soft_wrap=True)
