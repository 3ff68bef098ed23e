"""The menus after a search: choose a trial, look, talk, measure, save. Measures nothing itself.

Whatever goes wrong in an action is one line, and the menu comes back: finished trials are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Protocol

from rich.cells import set_cell_size
from rich.console import Console

from heretic_kl.errors import HereticKLError, NotEmptyError
from heretic_kl.files import holds_files
from heretic_kl.report import (
    compare_trials,
    describe_edit,
    details_lines,
    front_rows,
    scores_line,
    to_ascii,
    trial_details,
)
from heretic_kl.search import UNEDITED, TrialRecord, alike_behind, by_score, meeting
from heretic_kl.ui.asking import (
    MARK,
    TAKES,
    ask_count,
    ask_folder,
    ask_line,
    choose,
    confirm,
    forget_typed,
)
from heretic_kl.ui.chat import RESPONSE_TOKENS, ChatSession, chat
from heretic_kl.ui.event_lines import print_front
from heretic_kl.ui.preview import PreviewSession, preview
from heretic_kl.ui.print_tables import print_comparison
from heretic_kl.ui.terminal import say, unechoed

if TYPE_CHECKING:
    from heretic_kl.events import ModelSaved
    from heretic_kl.scoring import Score

MORE_TRIALS: Final = 20
"""Offered when more are to be run."""


class PickerSession(ChatSession, PreviewSession, Protocol):
    """What the menus need of a run."""

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials."""

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, by the first objective."""

    @property
    def notable_trials(self) -> Mapping[int, str]:
        """What some of its trials are, by number; the one to begin with comes first."""

    @property
    def roles(self) -> Mapping[str, str]:
        """Of the scorers that steer the search: minimize or maximize, by name."""

    @property
    def baseline(self) -> Mapping[str, Score]:
        """The unedited model on the validation prompts."""

    def test_scores(self, number: int) -> Mapping[str, Score] | None:
        """A trial's scores on the test prompts, if they were measured."""

    def test_one(self, number: int) -> Mapping[str, Score]:
        """Measure a trial on the test prompts and keep the scores."""

    def search(self, until: int) -> None:
        """Run trials until so many are finished."""

    def save(
        self,
        record: TrialRecord,
        folder: Path,
        form: Literal["merged", "lora"],
        *,
        overwrite: bool = False,
    ) -> ModelSaved:
        """Write a trial's model; the observer shows what came of it."""


class Picker:
    """Menus around one session.

    Args:
        session: the run.
        console: where tables and lines go.
        default_folder: where a trial's model is saved unless the person says otherwise.
        upload: puts a folder into a private repository of the hub, with or without replacing what
            that holds; None: uploading is not offered.
        settle: stops what an observer still draws, so that a question can be asked.
        response_tokens: longest response in a chat.
    """

    def __init__(
        self,
        session: PickerSession,
        console: Console,
        *,
        default_folder: Callable[[TrialRecord], Path],
        upload: Callable[[Path, str, bool], object] | None = None,
        settle: Callable[[], None] = lambda: None,
        response_tokens: int = RESPONSE_TOKENS,
    ) -> None:
        self._session = session
        self._console = console
        self._default_folder = default_folder
        self._upload_to = upload
        self._saved: dict[int, Path] = {}  # trial -> where its model was saved last
        self._settle = settle
        self._response_tokens = response_tokens
        self._sorted_by: str | None = None  # a scorer; None: as the front is
        self._limits: str | None = None  # as a pick rule has them
        self._every = False  # finished trials beside the front

    def run(self) -> int:
        """Ask until the person exits; the process's exit code."""
        self._settle()
        with unechoed():
            self._show_front()
            forget_typed()
            return self._choose_trials()

    def _choose_trials(self) -> int:
        at: str | None = None
        while True:
            listed = self._listed()
            if at is None and listed:
                at = str(next(iter(self._session.notable_trials)))
            choice = choose("Trial?", self._entries(listed), start_at=at, leave="exit")
            if choice is None or choice == "exit":
                return 0
            if choice == "more":
                self._more()
                at = None
            elif choice == "front":
                self._show_front()
            elif choice == "list":
                self._arrange()
                at = None
            else:
                at = choice
                self._trial(next(t for t in listed if str(t.number) == choice))

    def _entries(self, listed: Sequence[TrialRecord]) -> list[tuple[str, str] | None]:
        entries: list[tuple[str, str] | None] = [*self._trial_entries(listed)]
        if listed:
            entries.extend([None, ("front", "show the table again")])
        entries.append(("more", "run more trials"))
        if self._session.front:
            entries.append(("list", f"sort or filter the list{self._arrangement()}"))
        return [*entries, ("exit", "exit")]

    def _trial_entries(self, trials: Sequence[TrialRecord]) -> list[tuple[str, str]]:
        marks = self._session.notable_trials if trials else {}
        entries = []
        for trial in trials:
            mark = f"  <- {marks[trial.number]}" if trial.number in marks else ""
            text = f"{trial.number:>4}  {scores_line(trial.scores)}{mark}"
            entries.append((str(trial.number), self._fitted(text)))
        return entries

    def _listed(self) -> tuple[TrialRecord, ...]:
        """The trials as the person wants to see them."""
        trials = self._choosable()
        if self._limits is not None:
            trials = meeting(self._limits, trials)
        if self._sorted_by is not None:
            trials = by_score(self._sorted_by, trials, self._session.roles)
        return trials

    def _choosable(self) -> tuple[TrialRecord, ...]:
        return self._finished() if self._every else self._session.front

    def _finished(self) -> tuple[TrialRecord, ...]:
        """Every finished trial, in the order of a front."""
        complete = (trial for trial in self._session.trials if trial.state == "complete")
        return tuple(sorted(complete, key=lambda trial: (trial.objectives, trial.number)))

    def _arrangement(self) -> str:
        parts = ["every finished trial"] if self._every else []
        parts += [] if self._sorted_by is None else [f"by {self._sorted_by}"]
        parts += [] if self._limits is None else [self._limits]
        return f" (now: {', '.join(parts)})" if parts else ""

    def _arrange(self) -> None:
        """Ask how the list is sorted and what it holds."""
        entries: list[tuple[str, str] | None] = [
            (f"by {name}", f"sort by {name}, best first") for name in self._session.front[0].scores
        ]
        whose = "the front alone" if self._every else "every finished trial, not the front alone"
        entries += [("filter", "show only trials within limits")]
        entries += [("all", "neither sort nor filter"), ("every", f"list {whose}"), None]
        choice = choose("List:", [*entries, ("back", "back")])
        if choice is None or choice == "back":
            return
        if choice == "all":
            self._limits = self._sorted_by = None
        elif choice == "every":
            self._every = not self._every
        elif choice == "filter":
            line = ask_line(MARK, "Limits, as max-refusals=0.05,min-score=1:", keys=TAKES)
            if line and line.strip():
                self._filter(line.strip())
        else:
            self._sorted_by = choice.partition(" ")[2]

    def _filter(self, limits: str) -> None:
        try:
            if meeting(limits, self._choosable()):
                self._limits = limits
            else:
                which = "finished trial" if self._every else "trial of the front"
                self._say(f"no {which} meets {limits}", "yellow")
        except HereticKLError as error:
            self._say(f"error: {error}", "red")

    def _trial(self, record: TrialRecord) -> None:
        """The menu of one trial."""
        self._summary(record)
        at = "merged"
        while True:
            entries: list[tuple[str, str] | None] = [
                ("merged", "save the merged model"),
                ("lora", "save a LoRA adapter"),
                ("preview", "preview its responses"),
                ("chat", "chat with it beside the original"),
                ("details", "show details"),
                ("compare", "compare it with another trial"),
                ("back", "back"),
            ]
            if self._session.test_scores(record.number) is None:
                entries.insert(6, ("measure", "measure it on the test prompts"))
            if self._upload_to is not None and record.number in self._saved:
                entries.insert(-1, ("upload", f"upload {self._saved[record.number]} to the hub"))
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
            elif choice == "preview":
                self._attempt(lambda: preview(self._session, record, self._console), "stopped")
            elif choice == "compare":
                self._compare(record)
            elif choice == "upload":
                self._upload(self._saved[record.number])
            else:
                self._details(record)

    def _save(self, record: TrialRecord, form: Literal["merged", "lora"]) -> None:
        folder = ask_folder("Folder:", self._default_folder(record))
        if folder is None:
            return
        overwrite = False
        if holds_files(folder):
            if not confirm(f"{folder} is not empty. Overwrite what it holds?"):
                self._say("not saved")
                return
            overwrite = True

        def save() -> None:
            self._session.save(record, folder, form, overwrite=overwrite)
            self._saved[record.number] = folder

        self._attempt(save, f"stopped; {folder} may hold part of a model")

    def _upload(self, folder: Path) -> None:
        name = folder.resolve().name
        repo = ask_line(MARK, "Private repository, NAME or USER/NAME:", name, TAKES)
        if repo and repo.strip():
            self._attempt(
                lambda: self._put(folder, repo.strip()),
                f"stopped; the model is in {folder}, and uploading it again goes on",
            )

    def _put(self, folder: Path, repo: str) -> None:
        assert self._upload_to is not None  # or else it was not offered
        try:
            self._upload_to(folder, repo, False)
        except NotEmptyError:
            self._settle()
            forget_typed()
            if confirm(f"{repo} holds files. Replace them? Its history keeps them."):
                self._upload_to(folder, repo, True)
            else:
                self._say("not uploaded")

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
        searched = (trial for trial in self._session.trials if not trial.refinement)
        finished = sum(trial.state != "interrupted" for trial in searched)
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
        forget_typed()
        if problem is not None:
            self._say(problem, "yellow" if problem == interrupted else "red")

    def _show_front(self) -> None:
        front = self._session.front
        if not front:
            self._say("no finished trial to pick from yet")
            return
        rows = front_rows(
            front,
            self._tested(front),
            baseline=self._session.baseline,
            test_baseline=self._session.test_scores(UNEDITED),
            like=alike_behind(front, self._session.trials),
        )
        print_front(self._console, rows)

    def _tested(self, trials: Sequence[TrialRecord]) -> dict[int, Mapping[str, Score]]:
        measured = ((t.number, self._session.test_scores(t.number)) for t in trials)
        return {number: scores for number, scores in measured if scores is not None}

    def _compare(self, record: TrialRecord) -> None:
        """Ask for another trial, and show by how much this one differs."""
        finished = [trial for trial in self._finished() if trial.number != record.number]
        others = [trial for trial in self._listed() if trial.number != record.number]
        if not finished:
            self._say("there is no other finished trial to compare with", "yellow")
            return
        entries: list[tuple[str, str] | None] = [*self._trial_entries(others), None]
        if len(finished) > len(others):
            entries.append(("every", "another finished trial"))
        choice = choose("Compare with?", [*entries, ("back", "back")])
        if choice == "every":
            others = finished
            choice = choose("Compare with?", [*self._trial_entries(others), None, ("back", "back")])
        other = next((trial for trial in others if str(trial.number) == choice), None)
        if other is not None:
            tested = self._tested([record, other])
            print_comparison(self._console, compare_trials(record, other, tested))

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
