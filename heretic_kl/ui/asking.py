"""Questions at the keyboard; None where the person declines (Ctrl+C, Ctrl+D). Knows no trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import questionary
from prompt_toolkit.application import get_app_session
from prompt_toolkit.completion import PathCompleter
from prompt_toolkit.input.typeahead import clear_typeahead
from prompt_toolkit.key_binding import KeyBindings
from questionary import Choice, Question, Separator

from heretic_kl.ui.terminal import drop_unread

STYLE: Final = questionary.Style(
    [("pointer", "bold"), ("highlighted", "bold"), ("answer", "bold fg:default")]
)
"""The terminal's own colours: questionary's orange cannot be read on a light background."""
TAKES: Final = "(Enter takes it; Ctrl+C: back)"
"""Key help of a question for text."""
MARK: Final = ">"
"""In front of questions and of the entry under the cursor: plain, for any encoding."""


def forget_typed() -> None:
    """Drop keys that were typed before the next question, which they would answer, was there."""
    source = get_app_session().input
    try:
        terminal = source.fileno()
    except NotImplementedError:  # no input at all
        return
    if drop_unread(terminal):
        clear_typeahead(source)  # what an earlier question read and left


def keys_hint(leave: str) -> str:
    """Key help of a menu; the left arrow declines where that means `back`."""
    return f"(arrow keys, Enter; {'left or ' * (leave == 'back')}Ctrl+C: {leave})"


def choose(
    message: str,
    entries: Sequence[tuple[str, str] | None],  # value, title; None: a gap
    *,
    start_at: str | None = None,
    leave: str = "back",
) -> str | None:
    """One of several entries, by arrow keys; the value of the one taken.

    Args:
        message: the question.
        entries: what there is to choose from.
        start_at: the value under the cursor at first.
        leave: what declining means, for the hint; where it is `back`, the left arrow declines too.
    """
    choices = [Separator(" ") if e is None else Choice(e[1], value=e[0]) for e in entries]
    values = [entry[0] for entry in entries if entry is not None]
    question = questionary.select(
        message,
        choices=choices,
        default=start_at if start_at in values else None,
        qmark=MARK,
        pointer=MARK,
        style=STYLE,
        instruction=keys_hint(leave),
    )
    keys = question.application.key_bindings
    if leave == "back" and isinstance(keys, KeyBindings):
        keys.add("left", eager=True)(lambda event: event.app.exit(result=None))
    answer = _answer(question)
    return None if answer is None else str(answer)


def ask_folder(message: str, default: Path) -> Path | None:
    """A folder that may not exist yet; `~` is the home folder, Tab completes.

    `questionary.path` opens its list of completions while one types, and Enter then closes the
    list rather than taking the answer.
    """
    question = questionary.text(
        message,
        default=str(default),
        qmark=MARK,
        style=STYLE,
        instruction="(Tab completes, Enter takes it; Ctrl+C: back)",
        completer=PathCompleter(only_directories=True, expanduser=True),
        complete_while_typing=False,
    )
    answer = _answer(question)
    return Path(answer.strip()).expanduser() if answer and answer.strip() else None


def ask_count(message: str, default: int) -> int | None:
    """A whole number from 1."""
    question = questionary.text(
        message,
        default=str(default),
        validate=lambda text: _is_count(text) or "a whole number from 1, please",
        qmark=MARK,
        style=STYLE,
        instruction=TAKES,
    )
    answer = _answer(question)
    return None if answer is None else int(answer)


def ask_line(mark: str, message: str, default: str = "", keys: str | None = None) -> str | None:
    """A line of text, after a mark in bold; `keys` is the key help."""
    question = questionary.text(message, default=default, qmark=mark, style=STYLE, instruction=keys)
    answer = _answer(question)
    return None if answer is None else str(answer)


def confirm(message: str) -> bool:
    """Yes or no; no unless it is said."""
    question = questionary.confirm(message, default=False, qmark=MARK, style=STYLE)
    return bool(_answer(question))


def _answer(question: Question) -> Any:
    try:
        return question.unsafe_ask()
    except (KeyboardInterrupt, EOFError):
        return None


def _is_count(text: str) -> bool:
    return text.strip().isdecimal() and int(text) >= 1
