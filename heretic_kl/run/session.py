"""A run from model to saved edit: load, calibrate, directions, search, test, pick, save.

The public face of the steps, each of which is a file in this folder. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from heretic_kl.ablation import Plan
from heretic_kl.config import Settings
from heretic_kl.engine import Calibration, stream_response
from heretic_kl.errors import NoTrialError, SelectionError, SessionError, StorageLostError
from heretic_kl.events import ModelSaved, Observer, TrialPicked
from heretic_kl.export import SavedForm, check_target
from heretic_kl.model import edited
from heretic_kl.ranks import from_first, is_first
from heretic_kl.run.parts import RunParts
from heretic_kl.run.saving.save import save_trial
from heretic_kl.run.setup.open_run import Beside, open_run
from heretic_kl.run.teller import Teller
from heretic_kl.run.trials.preview import previewed_responses
from heretic_kl.run.trials.refine import refine_front
from heretic_kl.run.trials.search import search
from heretic_kl.run.trials.test import test_baseline, test_front, test_one
from heretic_kl.scoring import PreviewedResponse, Score, summed_judging
from heretic_kl.search import TrialRecord, notable_trials, pick


def _ignore(event: object) -> None:
    """The observer of those who want none."""


def _plan(parts: RunParts, record: TrialRecord) -> Plan:
    if record.edit is None:
        raise SelectionError(f"trial {record.number} was interrupted and has no edit")
    return parts.plan(record.edit)


class Session:
    """One model, one study; a context manager, whose methods work inside its block alone.

    Args:
        settings: what the user wants; never changed. `threads` is for the command line: a
            library leaves the process as it is.
        observer: told what happens.
        joins: the study is another process's: what it keeps of its run stays as it is.
        beside: what is taken from another study, whose trials are run again.
        keeps: the settings that the study keeps, where `settings` are those of one machine or of
            one of several processes.

    Raises:
        HereticKLError: on entering, anything the user can mend about model, prompts, scorers or
            storage.
        SessionError: a method is called outside the block.
    """

    def __init__(
        self,
        settings: Settings,
        observer: Observer = _ignore,
        *,
        joins: bool = False,
        beside: Beside | None = None,
        keeps: Settings | None = None,
    ) -> None:
        self.settings = settings
        self._keeps, self._beside = None if joins else keeps or settings, beside
        self._tell = Teller(observer if is_first() else _ignore)
        self._held = ExitStack()
        self._parts: RunParts | None = None
        self._rules: dict[int, str] = {}

    def __enter__(self) -> Session:
        with ExitStack() as held:
            self._parts = open_run(self.settings, self._keeps, self._tell, held, self._beside)
            self._held = held.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._parts is not None and not isinstance(error, StorageLostError):
                self._end_judging()
        finally:
            self._parts = None
            self._held.close()

    # --- what is known -----------------------------------------------------------------------

    @property
    def parts(self) -> RunParts:
        """Model, engine, study and the rest, for tools that look inside."""
        if self._parts is None:
            raise SessionError(
                "the session is not open: use it as `with Session(settings) as session:`"
            )
        return self._parts

    @property
    def calibration(self) -> Calibration:
        """What was found out about the model."""
        return self.parts.calibration

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """Every trial that is over."""
        return self.parts.study.records

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front on the validation prompts, by the first objective."""
        return self.parts.study.front

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the scorers that steer the search."""
        return tuple(spec.name for spec in self.parts.suite.objectives)

    @property
    def roles(self) -> dict[str, str]:
        """Of the scorers that steer the search: minimize or maximize, by name."""
        return {spec.name: spec.role for spec in self.parts.suite.objectives}

    @property
    def baseline(self) -> Mapping[str, Score]:
        """The unedited model on the validation prompts."""
        return self.parts.baseline

    def test_scores(self, number: int) -> Mapping[str, Score] | None:
        """A trial's scores on the test prompts, if they were measured."""
        return self.parts.study.test_scores(number)

    @property
    def tested(self) -> dict[int, Mapping[str, Score]]:
        """Scores on the test prompts of every trial that has them, by trial number."""
        scores = {record.number: self.test_scores(record.number) for record in self.trials}
        return {number: of_trial for number, of_trial in scores.items() if of_trial is not None}

    # --- what can be done --------------------------------------------------------------------

    def search(self, until: int | None = None) -> None:
        """Run trials until the study holds `until` finished ones (the setting's by default)."""
        search(self.parts, self.settings.trials if until is None else until)

    def refine(self) -> None:
        """Learn edits from the best trials, as many as the settings say; they join the study.

        One process at a time refines. Another one that runs the same study waits, and finds
        everything learned, or goes on where the first one died.
        """
        with self.parts.study.sole("refine"):
            refine_front(self.parts)

    def test(self) -> None:
        """Measure the front on the test prompts: at most `test_trials` of it, spread over it."""
        with self.parts.study.sole("test"):  # test prompts are used once
            test_front(self.parts)

    def tell_judging(self) -> None:
        """Say what judges were asked so far, here and by workers that ended meanwhile."""
        self._tell.judged(summed_judging([*self._judging(), *self.parts.study.judged_elsewhere()]))

    def _judging(self) -> list[dict[str, Mapping[str, Any]]]:
        """What the judges of this process were asked."""
        parts = self.parts
        tested = [parts.test_suite] if "test_suite" in vars(parts) else []
        return [used for suite in (parts.suite, *tested) if (used := suite.judging())]

    def _end_judging(self) -> None:
        """Tell the sums; a worker keeps its own for the process that began the run."""
        if not (ours := self._judging()):
            return
        if self._keeps is None:  # it joined
            self.parts.study.keep_judging(summed_judging(ours))
            self._tell.judged(summed_judging(ours))
        else:
            self.tell_judging()

    def test_one(self, number: int) -> Mapping[str, Score]:
        """A trial's scores on the test prompts, measured now if they were not before."""
        return test_one(self.parts, number)

    def test_baseline(self) -> Mapping[str, Score]:
        """The unedited model's scores on the test prompts."""
        return test_baseline(self.parts)

    @property
    def notable_trials(self) -> dict[int, str]:
        """Trials of the front to look at first; see `heretic_kl.search.notable_trials`."""
        target, suite = self.parts.settings.target_refusals, self.parts.suite
        lowered = [spec.name for spec in suite.objectives if spec.role == "minimize"]
        names = [name for name in suite.refusal_objectives if name in lowered]
        return notable_trials(self.front, f"likely-{names[0]}={target:g}" if names else None)

    def pick(self, rule: str) -> TrialRecord:
        """The trial that a rule names; see `heretic_kl.search.pick`.

        Raises:
            NoTrialError: no trial meets it; says which comes nearest, and how to get that one.
        """
        study = self.parts.study
        try:
            record = pick(rule, study.front, study.records)
        except NoTrialError as error:
            if error.nearest is None:
                raise
            raise NoTrialError(
                f"{error}: save it with `heretic-kl save {study.name} --trial {error.nearest}`, or "
                "run more trials",
                error.nearest,
            ) from None
        self._rules[record.number] = rule
        self._tell(TrialPicked(record, rule))
        return record

    def save(
        self,
        record: TrialRecord,
        folder: Path | str,
        form: SavedForm,
        *,
        overwrite: bool = False,
    ) -> ModelSaved:
        """Save a trial's model, read it back and measure it again.

        Raises:
            ExportError: it cannot be written, or does not load again.
            SelectionError: the trial was interrupted before its edit was drawn.
        """
        parts, folder = self.parts, Path(folder)
        from_first(lambda: check_target(folder, overwrite=overwrite, source=parts.lm.source.folder))
        plan, rule = _plan(parts, record), self._rules.get(record.number)
        test_one(parts, record.number)  # told as a test, not as part of saving
        what = "merged model" if form == "merged" else "LoRA adapter"
        with self._tell.stage("save", f"Saving and measuring the {what}"):
            saved = save_trial(
                parts, record, plan, folder, form, overwrite=overwrite, pick_rule=rule
            )
        self._tell(saved)
        return saved

    def stream_response(
        self,
        record: TrialRecord | None,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generator[str, None, None]:
        """Pieces of a response under a trial's edit (None: none).

        The edit is in force only while a piece is computed: two streams may take turns. They draw
        the same numbers where the seed is the same; a temperature of 0 is greedy.
        """
        parts = self.parts
        chat = parts.lm.chat
        ids = chat.encode_text(chat.conversation([dict(message) for message in messages]))
        plan = {} if record is None else _plan(parts, record)
        pieces = stream_response(parts.lm, ids, max_tokens, temperature, seed)
        while True:
            with edited(parts.lm.architecture, plan):
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def responses(
        self, record: TrialRecord | None, kind: Literal["harmless", "harmful"], count: int
    ) -> tuple[PreviewedResponse, ...]:
        """Responses to the first validation prompts, under a trial's edit (None: none)."""
        plan = None if record is None else _plan(self.parts, record)
        return previewed_responses(self.parts, plan, kind, count)
