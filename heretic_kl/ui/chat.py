"""A conversation with an edited model beside the original. Runs no model: it asks the session."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Final, Protocol

from rich.console import Console

from heretic_kl.errors import HereticKLError
from heretic_kl.search import TrialRecord
from heretic_kl.ui.asking import ask_line, forget_typed
from heretic_kl.ui.columns import GrowingColumns, Heading, fit_beside, print_columns
from heretic_kl.ui.terminal import say

RESPONSE_TOKENS: Final = 400
HELP: Final = (
    "commands: /original, /edited, /both (who responds), /history (side by side), /temperature T, "
    "/reset, /exit; Ctrl+C stops a response. Each side remembers what it answered itself. "
    "Responses are greedy, hence reproducible; above temperature 0 both sides draw with the same "
    "seed. Lines typed during a response come next."
)


class ChatSession(Protocol):
    """The part of a session that a conversation needs."""

    def stream_response(
        self,
        record: TrialRecord | None,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int,
        *,
        temperature: float,
        seed: int,
    ) -> Generator[str, None, None]:
        """Pieces of a response's text; a record of None is the unedited model.

        Several streams may take turns. A temperature of 0 is greedy.
        """
        ...


@dataclass
class Speaker:
    """One of the two models, with a conversation of its own."""

    name: str
    record: TrialRecord | None
    """None: the unedited model."""
    style: str
    messages: list[dict[str, str]] = field(default_factory=list)

    @property
    def heading(self) -> Heading:
        """What stands above its responses."""
        return Heading(self.name, f"bold {self.style}")

    def asked(self, line: str) -> list[dict[str, str]]:
        """The conversation with what the person says now."""
        return [*self.messages, {"role": "user", "content": line}]

    def keep(self, line: str, response: str) -> None:
        """Remember a turn."""
        self.messages = [*self.asked(line), {"role": "assistant", "content": response}]


@dataclass
class Turn:
    """What the person said, and who responded what."""

    number: int
    """From 0; the seed of what is drawn."""
    line: str
    temperature: float
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
    speakers, turns, temperature = who["/both"], list[Turn](), 0.0
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
        elif command.split()[0] == "/temperature":
            temperature = _temperature(command, temperature, console)
        elif command.startswith("/"):
            say(console, f"unknown command {command.split()[0]}; {HELP}", "yellow")
        else:
            turns.append(Turn(len(turns), line.strip(), temperature))
            beside = fit_beside(console)
            for group in [speakers] if beside else [[speaker] for speaker in speakers]:
                responses = _responses(session, group, turns[-1], console, max_tokens)
                turns[-1].responses.update(responses)


def _temperature(command: str, before: float, console: Console) -> float:
    """The temperature that a command sets; the one before where it sets none."""
    text = command.partition(" ")[2]
    try:
        wanted = float(text) if text else before
    except ValueError:
        wanted = math.nan
    if not 0 <= wanted < math.inf:
        say(console, f"temperature {text!r}: a number from 0 (greedy), please", "yellow")
        return before
    how = "greedy" if wanted == 0 else "drawn, by both sides with the same seed"
    say(console, f"temperature {wanted:g}: responses are {how}", "dim")
    return wanted


def _show_history(turns: Sequence[Turn], speakers: Sequence[Speaker], console: Console) -> None:
    """Every turn; two responses beside each other where the terminal is wide enough."""
    if not turns:
        say(console, "nothing was said yet", "dim")
    for turn in turns:
        say(console, f"> {turn.line}", "bold")
        present = [s for s in speakers if s.name in turn.responses]
        print_columns(
            console, [s.heading for s in present], [turn.responses[s.name] for s in present]
        )


def _responses(
    session: ChatSession,
    speakers: Sequence[Speaker],
    turn: Turn,
    console: Console,
    max_tokens: int,
) -> dict[str, str]:
    """Stream responses beside each other, a piece of each in turn; those that did not fail.

    They are kept and returned; what was stopped as far as it came.
    """

    def stream(speaker: Speaker) -> Generator[str, None, None]:
        return session.stream_response(
            speaker.record,
            speaker.asked(turn.line),
            max_tokens,
            temperature=turn.temperature,
            seed=turn.number,
        )

    responses = {speaker.name: "" for speaker in speakers}
    notes: list[tuple[str, str]] = []
    with ExitStack() as stack:
        streams = dict(enumerate(stack.enter_context(closing(stream(s))) for s in speakers))
        columns = stack.enter_context(GrowingColumns(console, [s.heading for s in speakers]))
        try:
            while streams:
                for place, pieces in list(streams.items()):
                    name = speakers[place].name
                    try:
                        piece = next(pieces)
                    except (StopIteration, HereticKLError) as error:
                        del streams[place]
                        columns.end(place)
                        if isinstance(error, HereticKLError):
                            notes.append((f"{name}: error: {error}", "red"))
                            del responses[name]
                        elif not responses[name].strip():
                            notes.append((f"{name}: (empty response)", "dim"))
                        continue
                    responses[name] += piece
                    columns.add(place, piece)
        except KeyboardInterrupt:
            forget_typed()
            notes.append(("(stopped)", "dim"))
    for note, style in notes:
        say(console, note, style)
    for speaker in speakers:
        if speaker.name in responses:
            speaker.keep(turn.line, responses[speaker.name])
    return responses
