"""The menus after a search: choose a trial, look, talk, measure, save. Measures nothing itself.

Whatever goes wrong in an action is one line, and the menu comes back: finished trials are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from rich.cells import set_cell_size
from rich.console import Console

from heretic_kl.errors import HereticKLError
from heretic_kl.report import (
    describe_edit,
    details_lines,
    front_rows,
    scores_line,
    to_ascii,
    trial_details,
)
from heretic_kl.search import UNEDITED, TrialRecord, knee
from heretic_kl.ui.asking import ask_count, ask_folder, choose, confirm
from heretic_kl.ui.chat import RESPONSE_TOKENS, ChatSession, chat
from heretic_kl.ui.console import print_front
from heretic_kl.ui.terminal import say

if TYPE_CHECKING:
    from heretic_kl.events import ModelSaved
    from heretic_kl.scoring import Score

MORE_TRIALS: Final = 20
"""Offered when more are to be run."""


class PickerSession(ChatSession, Protocol):
    """What the menus need of a run."""

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials."""
        ...

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, by the first objective."""
        ...

    @property
    def baseline(self) -> Mapping[str, Score]:
        """The unedited model on the validation prompts."""
        ...

    def test_scores(self, number: int) -> Mapping[str, Score] | None:
        """A trial's scores on the test prompts, if they were measured."""
        ...

    def test_one(self, number: int) -> Mapping[str, Score]:
        """Measure a trial on the test prompts and keep the scores."""
        ...

    def search(self, until: int) -> None:
        """Run trials until so many are finished."""
        ...

    def save(
        self,
        record: TrialRecord,
        folder: Path,
        form: Literal["merged", "lora"],
        *,
        overwrite: bool = False,
    ) -> ModelSaved:
        """Write a trial's model; the observer shows what came of it."""
        ...


def _nothing() -> None:
    """Nothing moves on the terminal."""


class Picker:
    """Menus around one session.

    Args:
        session: the run.
        console: where tables and lines go.
        default_folder: where a trial's model is saved unless the person says otherwise.
        settle: stops what an observer still draws, so that a question can be asked.
        response_tokens: longest response in a chat.
    """

    def __init__(
        self,
        session: PickerSession,
        console: Console,
        *,
        default_folder: Callable[[TrialRecord], Path],
        settle: Callable[[], None] = _nothing,
        response_tokens: int = RESPONSE_TOKENS,
    ) -> None:
        self._session = session
        self._console = console
        self._default_folder = default_folder
        self._settle = settle
        self._response_tokens = response_tokens

    def run(self) -> int:
        """Ask until the person exits; the process's exit code."""
        self._settle()
        self._show_front()
        at: str | None = None
        while True:
            front = self._session.front
            if at is None and front:
                at = str(knee(front).number)
            choice = choose("Trial?", self._entries(front), start_at=at, leave="exit")
            if choice is None or choice == "exit":
                return 0
            if choice == "more":
                self._more()
                at = None
            elif choice == "front":
                self._show_front()
            else:
                at = choice
                self._trial(next(t for t in front if str(t.number) == choice))

    def _entries(self, front: Sequence[TrialRecord]) -> list[tuple[str, str] | None]:
        best = knee(front).number if front else None
        entries: list[tuple[str, str] | None] = []
        for trial in front:
            mark = "  <- knee" if trial.number == best else ""
            text = f"{trial.number:>4}  {scores_line(trial.scores)}{mark}"
            entries.append((str(trial.number), self._fitted(text)))
        if front:
            entries.extend([None, ("front", "show the table again")])
        return [*entries, ("more", "run more trials"), ("exit", "exit")]

    def _trial(self, record: TrialRecord) -> None:
        """The menu of one trial."""
        self._summary(record)
        at = "merged"
        while True:
            entries: list[tuple[str, str] | None] = [
                ("merged", "save the merged model"),
                ("lora", "save a LoRA adapter"),
                ("chat", "chat with it beside the original"),
                ("details", "show details"),
                ("back", "back"),
            ]
            if self._session.test_scores(record.number) is None:
                entries.insert(4, ("measure", "measure it on the test prompts"))
            choice = choose(f"Trial {record.number}:", entries, start_at=at)
            if choice is None or choice == "back":
                return
            at = choice
            if choice == "merged":
                self._save(record, "merged")
            elif choice == "lora":
                self._save(record, "lora")
            elif choice == "chat":
                self._attempt(lambda: self._chat(record), "left the chat")
            elif choice == "measure":
                self._attempt(lambda: self._measure(record), "stopped, nothing was kept of it")
            else:
                self._details(record)

    def _save(self, record: TrialRecord, form: Literal["merged", "lora"]) -> None:
        folder = ask_folder("Folder:", self._default_folder(record))
        if folder is None:
            return
        overwrite = False
        if _holds_files(folder):
            if not confirm(f"{folder} is not empty. Overwrite what it holds?"):
                self._say("not saved")
                return
            overwrite = True
        self._attempt(
            lambda: self._session.save(record, folder, form, overwrite=overwrite),
            f"stopped; {folder} may hold part of a model",
        )

    def _measure(self, record: TrialRecord) -> None:
        self._say("measuring on the test prompts ...", "dim")
        self._session.test_one(record.number)
        self._settle()
        self._summary(record)

    def _chat(self, record: TrialRecord) -> None:
        chat(self._session, record, self._console, max_tokens=self._response_tokens)

    def _more(self) -> None:
        wanted = ask_count("How many more?", MORE_TRIALS)
        if wanted is None:
            return
        finished = sum(1 for trial in self._session.trials if trial.state != "interrupted")
        self._attempt(
            lambda: self._session.search(finished + wanted), "stopped; finished trials are kept"
        )
        self._show_front()

    def _attempt(self, action: Callable[[], object], interrupted: str) -> None:
        """Run an action; a failure or Ctrl+C is a line, not the end."""
        problem: str | None = None
        try:
            action()
        except KeyboardInterrupt:
            problem = interrupted
        except (HereticKLError, OSError) as error:
            problem = f"error: {error}"
        self._settle()
        if problem is not None:
            self._say(problem, "yellow" if problem == interrupted else "red")

    def _show_front(self) -> None:
        front = self._session.front
        if not front:
            self._say("no finished trial to pick from yet")
            return
        measured = ((t.number, self._session.test_scores(t.number)) for t in front)
        tested = {number: scores for number, scores in measured if scores is not None}
        rows = front_rows(
            front,
            tested,
            baseline=self._session.baseline,
            test_baseline=self._session.test_scores(UNEDITED),
        )
        print_front(self._console, rows)

    def _summary(self, record: TrialRecord) -> None:
        self._say(f"Trial {record.number}: {describe_edit(record.edit)}", "bold")
        self._say(f"  validation prompts: {scores_line(record.scores, full=True)}")
        test_scores = self._session.test_scores(record.number)
        if test_scores is not None:
            self._say(f"  test prompts: {scores_line(test_scores, full=True)}")

    def _details(self, record: TrialRecord) -> None:
        for line in details_lines(trial_details(record, self._session.test_scores(record.number))):
            self._say(line, None if line.startswith(" ") else "bold")

    def _say(self, text: str, style: str | None = None) -> None:
        say(self._console, text, style)

    def _fitted(self, text: str) -> str:
        """A menu entry on one line."""
        if self._console.options.ascii_only:
            text = to_ascii(text)
        return set_cell_size(text, max(10, self._console.width - 4)).rstrip()


def _holds_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False
