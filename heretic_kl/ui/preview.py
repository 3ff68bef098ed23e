"""A look at what a trial responds before it is saved. Runs no model: it asks the session."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, Protocol

from rich.console import Console

from heretic_kl.scoring import PreviewedResponse
from heretic_kl.search import TrialRecord
from heretic_kl.ui.asking import choose
from heretic_kl.ui.columns import Heading, print_columns
from heretic_kl.ui.terminal import say

SHOWN_RESPONSES: Final = 3
"""Harmless prompts whose responses are shown."""
SHOWN_VERDICTS: Final = 10
"""Harmful prompts of which is said who refuses them."""
VERDICT_WIDTH: Final = 12
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
    print_responses(console, original, edited, record.number)


def print_responses(
    console: Console,
    original: Sequence[PreviewedResponse],
    edited: Sequence[PreviewedResponse],
    trial: int,
) -> None:
    """The original's responses beside a trial's, to the same prompts."""
    for before, after in zip(original, edited, strict=True):
        console.print()
        say(console, f"> {_shortened(before.prompt)}", "bold")
        if before.text == after.text:
            name = f"both, word for word{_broken(before)}"
            print_columns(console, [Heading(name, "bold")], [before.text])
        else:
            headings = (
                Heading(f"original{_broken(before)}", "bold cyan"),
                Heading(f"edited, trial {trial}{_broken(after)}", "bold green"),
            )
            print_columns(console, headings, [before.text, after.text])


def show_verdicts(session: PreviewSession, record: TrialRecord, console: Console) -> None:
    """Who refuses some harmful validation prompts; no response to them is shown."""
    say(console, "responding ...", "dim")
    original = session.responses(None, "harmful", SHOWN_VERDICTS)
    edited = session.responses(record, "harmful", SHOWN_VERDICTS)
    print_verdicts(console, original, edited)


def print_verdicts(
    console: Console,
    original: Sequence[PreviewedResponse],
    edited: Sequence[PreviewedResponse],
) -> None:
    """What the original and a trial do with the same prompts, in a word each."""
    width = (
        max(20, console.width - 2 * VERDICT_WIDTH - 4) if console.is_terminal else PROMPT_CHARACTERS
    )
    say(console, f"{'original':<{VERDICT_WIDTH}}{'edited':<{VERDICT_WIDTH}}prompt", "bold")
    for before, after in zip(original, edited, strict=True):
        say(
            console,
            f"{verdict(before):<{VERDICT_WIDTH}}{verdict(after):<{VERDICT_WIDTH}}"
            f"{_shortened(before.prompt, width)}",
            "yellow" if after.degeneracy else None if before.refuses == after.refuses else "green",
        )


def verdict(response: PreviewedResponse) -> str:
    """`refuses`, `responds` or `degenerate`."""
    if response.degeneracy is not None:
        return "degenerate"
    return "refuses" if response.refuses else "responds"


def _broken(response: PreviewedResponse) -> str:
    """What stands behind the name of who responds so."""
    return "" if response.degeneracy is None else f" (degenerate: {response.degeneracy})"


def _shortened(prompt: str, most: int = PROMPT_CHARACTERS) -> str:
    """On one line."""
    line = " ".join(prompt.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
