"""A look at what a trial responds before it is saved. Runs no model: it asks the session."""

from __future__ import annotations

from typing import Final, Literal, Protocol

from rich.console import Console

from heretic_kl.scoring import PreviewedResponse
from heretic_kl.search import TrialRecord
from heretic_kl.ui.asking import choose
from heretic_kl.ui.columns import Heading, print_columns
from heretic_kl.ui.terminal import printable, say

SHOWN_RESPONSES: Final = 3
"""Harmless prompts whose responses are shown."""
SHOWN_VERDICTS: Final = 10
"""Harmful prompts of which is said who refuses them."""
PROMPT_CHARACTERS: Final = 300
"""Of a prompt that is shown above its responses."""


class PreviewSession(Protocol):
    """The part of a session that a preview needs."""

    def responses(
        self, record: TrialRecord | None, kind: Literal["harmless", "harmful"], count: int
    ) -> tuple[PreviewedResponse, ...]:
        """Responses to the first validation prompts; a record of None is the unedited model."""
        ...


def preview(session: PreviewSession, record: TrialRecord, console: Console) -> None:
    """Ask what is to be seen, and show it."""
    choice = choose(
        "Preview:",
        [
            ("harmless", "responses to harmless prompts, original beside edited"),
            ("harmful", "harmful prompts: who refuses them"),
            ("back", "back"),
        ],
    )
    if choice == "harmless":
        show_responses(session, record, console)
    elif choice == "harmful":
        show_verdicts(session, record, console)


def show_responses(session: PreviewSession, record: TrialRecord, console: Console) -> None:
    """Responses to some harmless validation prompts."""
    say(console, "responding ...", "dim")
    original = session.responses(None, "harmless", SHOWN_RESPONSES)
    edited = session.responses(record, "harmless", SHOWN_RESPONSES)
    headings = Heading("original", "bold cyan"), Heading(_name(record), "bold green")
    for before, after in zip(original, edited, strict=True):
        console.print()
        say(console, f"> {_shortened(before.prompt)}", "bold")
        if before.text == after.text:
            print_columns(console, [Heading("both, word for word", "bold")], [before.text])
        else:
            print_columns(console, headings, [before.text, after.text])


def show_verdicts(session: PreviewSession, record: TrialRecord, console: Console) -> None:
    """Who refuses some harmful validation prompts; no response to them is shown."""
    say(console, "responding ...", "dim")
    original = session.responses(None, "harmful", SHOWN_VERDICTS)
    edited = session.responses(record, "harmful", SHOWN_VERDICTS)
    width = max(20, console.width - 24) if console.is_terminal else PROMPT_CHARACTERS
    say(console, f"{'original':<10}{'edited':<10}prompt", "bold")
    for before, after in zip(original, edited, strict=True):
        say(
            console,
            f"{_verdict(before):<10}{_verdict(after):<10}{_shortened(before.prompt, width)}",
            None if before.refuses == after.refuses else "green",
        )


def _name(record: TrialRecord) -> str:
    return f"edited, trial {record.number}"


def _verdict(response: PreviewedResponse) -> str:
    return "refuses" if response.refuses else "responds"


def _shortened(prompt: str, most: int = PROMPT_CHARACTERS) -> str:
    """On one line."""
    line = " ".join(printable(prompt).split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
