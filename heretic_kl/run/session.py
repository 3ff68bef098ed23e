"""A run from model to saved edit: load, calibrate, directions, search, test, pick, save.

Translates settings into plain arguments, tells an observer what happens, prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

from heretic_kl import events
from heretic_kl.ablation import Directions, EditParameters, Plan, build_plan, difference_of_means
from heretic_kl.config import Settings
from heretic_kl.engine import (
    stream_response,
)
from heretic_kl.errors import MeasurementError, ModelError
from heretic_kl.events import Observer
from heretic_kl.export import SavedForm, check_target
from heretic_kl.model import (
    ModelSource,
    edited,
    verify_sites,
)
from heretic_kl.prompts.sets import PromptSets, load_prompt_sets
from heretic_kl.run.calibrate import calibrate
from heretic_kl.run.fingerprint import default_study_name, study_fingerprint
from heretic_kl.run.model import load_model_of, model_source
from heretic_kl.run.save import TrialToSave, save_trial
from heretic_kl.scoring import MeasuringContext, Score, ScorerSpec, Stopped, Suite
from heretic_kl.search import (
    UNEDITED,
    SearchSpace,
    SearchStudy,
    TrialRecord,
    check_rule,
    open_storage,
    pick,
    spread,
)


class Session:
    """One model, one study; use it as a context manager.

    Args:
        settings: what the user wants; never changed.
        observer: told what happens.

    Raises:
        HereticKLError: on entering, anything the user can mend about model, prompts, scorers or
            storage.
    """

    def __init__(self, settings: Settings, observer: Observer) -> None:
        self.settings = settings
        self._emit = observer
        self._held = ExitStack()
        self._picked: dict[int, str] = {}

    def __enter__(self) -> Session:
        try:
            self._open()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._held.close()

    # --- what is known -----------------------------------------------------------------------

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """Every trial that is over."""
        return self._study.records

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front on the validation prompts, by the first objective."""
        return self._study.front

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the scorers that steer the search."""
        return tuple(spec.name for spec in self._suite.objectives)

    @property
    def baseline(self) -> Mapping[str, Score]:
        """The unedited model on the validation prompts."""
        return self._baseline

    def test_scores(self, number: int) -> Mapping[str, Score] | None:
        """A trial's scores on the test prompts, if they were measured."""
        return self._study.test_scores(number)

    @property
    def tested(self) -> dict[int, Mapping[str, Score]]:
        """Scores on the test prompts of every trial that has them, by trial number."""
        scores = {record.number: self.test_scores(record.number) for record in self.trials}
        return {number: of_trial for number, of_trial in scores.items() if of_trial is not None}

    # --- what can be done --------------------------------------------------------------------

    def search(self, until: int | None = None) -> None:
        """Run trials until the study holds `until` finished ones (the setting's by default)."""
        wanted = self.settings.trials if until is None else until
        with self._stage("search", "Searching", wanted):
            start, begun = time.perf_counter(), self._study.finished
            trials = self._study.run(
                wanted,
                self._evaluate,
                candidates=self.settings.parallel_candidates
                if self._lm.architecture.by_rows
                else 1,
                notify=self._notice,
            )
            for record in trials:
                finished = self._study.finished
                pace = (time.perf_counter() - start) / max(1, finished - begun)
                left = pace * (wanted - finished)
                self._emit(events.TrialFinished(record, finished, wanted, self.front, left))

    def test(self) -> None:
        """Measure the front on the test prompts: at most `test_trials` of it.

        Where the front is longer, trials are taken evenly along it, the ends included.
        """
        chosen = spread(self.front, self.settings.test_trials)
        todo = [record for record in chosen if self.test_scores(record.number) is None]
        if not todo:
            return
        with self._stage("test", "Measuring the front on the test prompts", len(todo)):
            self.test_baseline()
            for record in todo:
                self.test_one(record.number)

    def test_one(self, number: int) -> Mapping[str, Score]:
        """A trial's scores on the test prompts, measured now if they were not before."""
        known = self.test_scores(number)
        if known is not None:
            return known
        record = next(trial for trial in self.trials if trial.number == number)
        scores = self._test_suite().evaluate(self._engine, self._plan(record))
        self._study.keep_test_scores(number, scores)
        self._emit(events.TrialTested(record, scores))
        return scores

    def test_baseline(self) -> Mapping[str, Score]:
        """The unedited model's scores on the test prompts."""
        known = self.test_scores(UNEDITED)
        if known is not None:
            return known
        scores = self._test_suite().evaluate(self._engine, None)
        self._study.keep_test_scores(UNEDITED, scores)
        self._emit(events.BaselineMeasured("test", scores))
        return scores

    def pick(self, rule: str) -> TrialRecord:
        """The trial that a rule names; see `heretic_kl.search.pick`."""
        record = pick(rule, self.front, self.trials)
        self._picked[record.number] = rule
        self._emit(events.TrialPicked(record, rule))
        return record

    def save(
        self,
        record: TrialRecord,
        folder: Path,
        form: SavedForm,
        *,
        overwrite: bool = False,
    ) -> events.ModelSaved:
        """Save a trial's model, read it back and measure it again.

        Raises:
            ExportError: it cannot be written, or does not load again.
        """
        check_target(folder, overwrite=overwrite, source=self._lm.source.folder)
        scores = self.test_one(record.number)
        what = "merged model" if form == "merged" else "LoRA adapter"
        with self._stage("save", f"Saving and measuring the {what}"):
            trial = TrialToSave(
                record=record,
                plan=self._plan(record),
                scores=scores,
                original=self.test_baseline(),
                trials=self._study.finished,
                pick_rule=self._picked.get(record.number),
            )
            saved = save_trial(
                trial,
                folder,
                form,
                overwrite=overwrite,
                engine=self._engine,
                suite=self._test_suite(),
                settings=self.settings,
                calibration=self.calibration,
                prompts=self._prompts,
            )
        self._emit(saved)
        return saved

    def stream_response(
        self,
        record: TrialRecord | None,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int,
    ) -> Generator[str, None, None]:
        """Answer a conversation piece by piece, under a trial's edit (None: none) until closed."""
        chat = self._lm.chat
        ids = chat.encode_text(chat.conversation([dict(message) for message in messages]))
        plan = {} if record is None else self._plan(record)
        with edited(self._lm.architecture, plan):
            yield from stream_response(self._lm, ids, max_tokens)

    # --- opening -----------------------------------------------------------------------------

    def _open(self) -> None:
        settings = self.settings
        if settings.save is not None:
            source = ModelSource(settings.model or "", settings.revision).folder
            check_target(settings.save, overwrite=settings.overwrite, source=source)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._suite = Suite(self._scorer_specs())
        if settings.pick is not None:
            check_rule(settings.pick, self.objectives)
        self._prompts = self._load_prompts()
        self._load()
        self._calibrate()
        self._find_directions()
        self._measure_baseline()
        self._open_study()

    def _scorer_specs(self) -> tuple[ScorerSpec, ...]:
        return tuple(
            ScorerSpec(name, table.use or name, table.role, table.settings)
            for name, table in self.settings.scorers.items()
            if table.enabled
        )

    def _load_prompts(self) -> PromptSets:
        sets = load_prompt_sets(self.settings.prompts.model_dump(), self.settings.prompt_set)
        for notice in sets.notices:
            self._emit(events.Notice(notice))
        return sets

    def _load(self) -> None:
        settings = self.settings
        with self._stage("load", f"Loading {model_source(settings).short_name}"):
            self._lm = load_model_of(settings)
            self._site_residue = verify_sites(self._lm).residue
        lm, edit = self._lm, self.settings.edit
        keep = edit.norm != "none"
        self._components = lm.architecture.editable(edit.components, restore_norms=keep)
        for remark in lm.remarks(plain_text_wanted=settings.chat_template == "none"):
            self._notice(remark)
        self._emit(
            events.ModelLoaded(
                name=lm.source.name,
                parameters=lm.parameter_count,
                layers=len(lm.architecture.layers),
                sites=len(lm.architecture.sites),
                dtype=lm.dtype_name,
                device=str(lm.device),
            )
        )

    def _calibrate(self) -> None:
        with self._stage("calibrate", "Calibrating"):
            self._engine, self.calibration = calibrate(
                self._lm,
                self.settings,
                self._prompts,
                site_residue=self._site_residue,
                tell=lambda name, value: self._emit(events.CalibrationStep(name, value)),
                notify=self._notice,
            )
            self._lm = self._engine.lm

    def _find_directions(self) -> None:
        table, sets = self.settings.directions, self._prompts
        with self._stage("directions", "Finding directions", 2):
            means = []
            for prompts in (sets["harmful", "train"], sets["harmless", "train"]):
                means.append(self._engine.residual_mean(prompts, table.winsorize_quantile))
                self._emit(events.StageAdvanced("directions"))
            try:
                self._directions: Directions = difference_of_means(
                    means[0], means[1], project_off_baseline=table.project_off_harmless
                )
            except ValueError as error:
                raise MeasurementError(
                    f"{error}: harmful and harmless training prompts must differ"
                ) from error
        self._facts = self._lm.architecture.facts()

    def _measure_baseline(self) -> None:
        with self._stage("baseline", "Measuring the original model"):
            self._suite.prepare(self._context("validation"))
            self._baseline = self._suite.evaluate(self._engine, None)
        self._emit(events.BaselineMeasured("validation", self._baseline))

    def _open_study(self) -> None:
        settings = self.settings
        fingerprint = study_fingerprint(
            settings, self._lm, self.calibration, self._prompts, self._suite
        )
        name = settings.study_name or default_study_name(self._lm.source, fingerprint)
        storage = self._held.enter_context(open_storage(settings.storage, settings.study_dir, name))
        self._study = SearchStudy(
            storage,
            name,
            fingerprint=fingerprint,
            space=SearchSpace(
                layers=len(self._lm.architecture.layers),
                components=self._components,
                norm=settings.edit.norm,
            ),
            objectives=self._suite.objectives,
            seed=settings.seed,
            startup_trials=settings.startup_trials,
        )
        location = "the given storage" if settings.storage else str(settings.study_dir)
        self._emit(events.StudyOpened(name, location, self._study.finished, settings.trials))

    # --- measuring ---------------------------------------------------------------------------

    def _context(self, use: Literal["validation", "test"]) -> MeasuringContext:
        return MeasuringContext(
            engine=self._engine,
            prompts_by_kind=self._prompts.of(use),
            kl_tokens=self.settings.kl_tokens,
            max_response_tokens=self.settings.max_response_tokens,
            noise_floor=self.calibration.noise_floor.value,
            use=use,
        )

    def _test_suite(self) -> Suite:
        if not hasattr(self, "_prepared_test_suite"):
            suite = Suite(self._suite.specs)
            suite.prepare(self._context("test"))
            self._prepared_test_suite = suite
        return self._prepared_test_suite

    def _evaluate(self, edits: Sequence[EditParameters]) -> list[dict[str, Score] | Stopped]:
        plans = [self._build(edit) for edit in edits]
        rivals = self.front if self.settings.racing else ()
        return self._suite.evaluate_objectives(self._engine, plans, rivals=rivals)

    def _plan(self, record: TrialRecord) -> Plan:
        assert record.edit is not None
        return self._build(record.edit)

    def _build(self, edit: EditParameters) -> Plan:
        try:
            return build_plan(edit, self._directions, self._facts)
        except ValueError as error:
            raise ModelError(str(error)) from error

    # --- telling -----------------------------------------------------------------------------

    @contextmanager
    def _stage(self, stage: events.Stage, title: str, steps: int | None = None) -> Iterator[None]:
        self._emit(events.StageStarted(stage, title, steps))
        start = time.perf_counter()
        yield
        self._emit(events.StageFinished(stage, time.perf_counter() - start))

    def _notice(self, message: str) -> None:
        self._emit(events.Notice(message))
