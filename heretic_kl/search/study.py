"""The ask-and-tell loop around Optuna: resumable, one record a trial. Runs no model itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.ablation import EditParameters, Refinement
from heretic_kl.errors import StudyError
from heretic_kl.scoring import Score, ScorerSpec, Stopped
from heretic_kl.search.lease import is_abandoned, lease_attributes, renewing
from heretic_kl.search.pareto import pareto_front
from heretic_kl.search.records import (
    REFINEMENT,
    SECONDS,
    Outcome,
    TrialRecord,
    error_attributes,
    one_line,
    outcome_attributes,
    read_record,
    refinement_attributes,
    scores_from_json,
    scores_to_json,
)
from heretic_kl.search.sampler import ERROR, INTERRUPTED, NumberedSampler
from heretic_kl.search.space import (
    REFINE,
    SearchSpace,
    refinement_distributions,
    refinement_parameters,
)

FINGERPRINT = "heretic-kl:fingerprint"
BATCH_SIZE = "heretic-kl:batch-size"
TEST_SCORES = "heretic-kl:test:"
"""Attributes of a study; the last one is followed by a trial's number."""
OVER = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
MOST_FAILURES_IN_A_ROW = 5

Evaluate = Callable[[Sequence[EditParameters]], Sequence[Outcome]]
"""Measures K >= 1 edits on the validation prompts; one outcome each, in order."""
Notify = Callable[[str], None]


class _Measured(NamedTuple):
    """What came of one trial: an outcome or an error."""

    outcome: Outcome | None
    error: Exception | None
    seconds: float


class SearchStudy:
    """One study: its trials so far, and the means to run more.

    Args:
        storage: where it is kept.
        name: its name there.
        fingerprint: everything that makes its scores comparable, as flat JSON-ready values.
        space: what trials may vary.
        objectives: the scorers that steer it, in order.
        seed: of the sampler.
        startup_trials: random trials before the sampler learns.
        batch_size: kept by a new study; see `stored_batch_size`.
        limits: largest acceptable score by scorer; to the sampler trials above are worse than all
            others, the more so the further above.

    Raises:
        StudyError: the storage holds a study of this name with another fingerprint, or cannot
            be read.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        *,
        fingerprint: Mapping[str, Any],
        space: SearchSpace,
        objectives: Sequence[ScorerSpec],
        seed: int,
        startup_trials: int,
        batch_size: int | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        self.name = name
        self._space = space
        self._objectives = tuple(objectives)
        self._limits = dict(limits or {})
        self._records: dict[int, TrialRecord] = {}
        try:
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize"] * len(self._objectives),
                load_if_exists=True,
                sampler=NumberedSampler(seed, startup_trials),
            )
        except Exception as error:  # each storage raises its own
            raise StudyError(f"cannot open study {name!r}: {_reason(error)}") from error
        self._check_fingerprint(fingerprint)
        if batch_size is not None and BATCH_SIZE not in self._study.user_attrs:
            self._study.set_user_attr(BATCH_SIZE, batch_size)
        self._end_abandoned()

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """Every trial that was started and is over, by number; each is parsed once."""
        trials = self._study.get_trials(deepcopy=False, states=OVER)
        return tuple(self._record(trial) for trial in trials)

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, by the first objective."""
        return pareto_front(self.records)

    @property
    def finished(self) -> int:
        """Trials that ran to an end, stopped and failed ones included, interrupted ones not.

        Refined trials are not among them: see `refined`.
        """
        finished = (record for record in self.records if record.state != "interrupted")
        return sum(1 for record in finished if not _is_refined(record))

    @property
    def refined(self) -> tuple[TrialRecord, ...]:
        """Trials whose edit was learned, by number."""
        return tuple(record for record in self.records if _is_refined(record))

    def add_refined(
        self, start: TrialRecord, refinement: Refinement, outcome: Outcome, seconds: float
    ) -> TrialRecord:
        """Record a trial whose edit was learned from another trial's, measured as any other.

        Args:
            start: the trial that it started from.
            refinement: what was learned.
            outcome: on the validation prompts.
            seconds: of learning and measuring.
        """
        self._check(outcome)
        assert not isinstance(outcome, Stopped)  # nothing races against it
        before = self._study.get_trials(deepcopy=False)
        start_distributions = before[start.number].distributions
        distributions = {n: d for n, d in start_distributions.items() if not n.startswith(REFINE)}
        parameters = {name: start.parameters[name] for name in distributions}
        self._study.add_trial(
            optuna.create_trial(
                values=self._values(outcome),
                params={**parameters, **refinement_parameters(refinement)},
                distributions={**distributions, **refinement_distributions()},
                constraints=self._excesses(outcome),
                user_attrs={
                    SECONDS: seconds,
                    **refinement_attributes(refinement),
                    **outcome_attributes(outcome),
                },
            )
        )
        added = self._study.get_trials(deepcopy=False)[len(before) :]
        return next(r for t in added if REFINEMENT in t.user_attrs for r in [self._record(t)])

    def run(
        self,
        until: int,
        evaluate: Evaluate,
        *,
        candidates: int = 1,
        notify: Notify = lambda message: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[TrialRecord]:
        """Run trials until the study holds `until` finished ones.

        A trial that raises is recorded as failed, with its traceback, and the search goes on.
        Where several candidates cannot be measured together, each is measured alone.

        Args:
            until: finished trials to hold in the end.
            evaluate: measures the edits of several trials.
            candidates: K, how many it is given at a time, the last ones aside. The sampler draws
                them without knowing each other's scores.
            notify: told, in words, when several could not be measured together.
            stop: asked before trials are begun; True ends the search.

        Yields:
            A record a trial, as it finishes.

        Raises:
            StudyError: several trials in a row failed.
        """
        self._enqueue_known_good()
        failures = 0
        while (missing := until - self.finished) > 0 and not stop():
            if self._end_abandoned():
                self._enqueue_known_good()
            for record in self._run_group(max(1, min(candidates, missing)), evaluate, notify):
                failures = failures + 1 if record.state == "failed" else 0
                yield record
                if failures >= MOST_FAILURES_IN_A_ROW:
                    raise StudyError(f"{failures} trials in a row failed; the last: {record.error}")

    def test_scores(self, number: int) -> dict[str, Score] | None:
        """A trial's scores on the test prompts, if they were measured."""
        stored = self._study.user_attrs.get(f"{TEST_SCORES}{number}")
        return None if stored is None else scores_from_json(stored)

    def keep_test_scores(self, number: int, scores: Mapping[str, Score]) -> None:
        """Keep a trial's scores on the test prompts; `UNEDITED` counts as one."""
        self._study.set_user_attr(f"{TEST_SCORES}{number}", scores_to_json(scores))

    # --- running -----------------------------------------------------------------------------

    def _enqueue_known_good(self) -> None:
        """Queue what is neither queued nor measured; an interrupted trial was not measured."""
        queued = [
            dict(trial.system_attrs.get("fixed_params", trial.params))
            for trial in self._study.get_trials(deepcopy=False)
            if trial.user_attrs.get(ERROR) != INTERRUPTED
        ]
        for parameters in self._space.known_good():
            if parameters not in queued:
                self._study.enqueue_trial(parameters)

    def _run_group(self, count: int, evaluate: Evaluate, notify: Notify) -> Iterator[TrialRecord]:
        """Ask for trials, measure them, tell; what does not get that far is marked interrupted."""
        running: list[optuna.Trial] = []
        edits = []
        try:
            for _ in range(count):
                trial = self._study.ask()
                running.append(trial)
                _set(trial, lease_attributes())
                edits.append(self._space.edit(self._space.suggest(trial)))
            with renewing(lambda: _renew(tuple(running))):
                measured = self._measure(edits, evaluate, notify)
                for trial, result in zip(tuple(running), measured, strict=True):
                    self._tell(trial, result)
                    running.remove(trial)
                    yield self._record(self._study.get_trials(deepcopy=False)[trial.number])
        finally:
            for trial in running:
                self._interrupt(trial)

    def _measure(
        self, edits: Sequence[EditParameters], evaluate: Evaluate, notify: Notify
    ) -> Iterator[_Measured]:
        """Measure edits together; where that fails, one by one, so that each fails for itself."""
        start = time.perf_counter()
        try:
            outcomes = list(evaluate(edits))
            for outcome in outcomes:
                self._check(outcome)
        except Exception as error:  # plug-ins and drivers may raise anything
            if len(edits) == 1:
                yield _Measured(None, error, time.perf_counter() - start)
                return
            notify(f"{len(edits)} candidates are measured one by one: {one_line(error)}")
        else:
            share = (time.perf_counter() - start) / len(edits)
            yield from (_Measured(outcome, None, share) for outcome in outcomes)
            return
        for edit in edits:
            yield from self._measure([edit], evaluate, notify)

    def _check(self, outcome: Outcome) -> None:
        """Raise now what storing it would raise."""
        outcome_attributes(outcome)
        if not isinstance(outcome, Stopped):
            self._values(outcome)

    def _tell(self, trial: optuna.Trial, measured: _Measured) -> None:
        try:
            trial.set_user_attr(SECONDS, measured.seconds)
            if measured.outcome is None:
                assert measured.error is not None
                _set(trial, error_attributes(measured.error))
                self._study.tell(trial, state=TrialState.FAIL)
                return
            _set(trial, outcome_attributes(measured.outcome))
            if isinstance(measured.outcome, Stopped):
                # Pruned trials have no value: to the sampler they are worse than finished ones.
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                for name, excess in self._excesses(measured.outcome).items():
                    trial.set_constraint(name, excess)
                self._study.tell(trial, self._values(measured.outcome))
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # the lease expired (a machine that slept) and another process ended the trial

    def _excesses(self, scores: Mapping[str, Score]) -> dict[str, float]:
        """By how much scores exceed their limits; at most 0 where they do not."""
        values = {name: scores[name].value for name in self._limits if name in scores}
        return {n: value - self._limits[n] for n, value in values.items() if value is not None}

    def _values(self, scores: Mapping[str, Score]) -> list[float]:
        values = []
        for spec in self._objectives:
            value = scores[spec.name].optimized
            assert value is not None  # the suite refuses objectives without a value
            values.append(-value if spec.role == "maximize" else value)
        return values

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        if trial.number not in self._records:
            self._records[trial.number] = read_record(trial, self._space)
        return self._records[trial.number]

    # --- resuming ----------------------------------------------------------------------------

    def _check_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        stored_text = self._study.user_attrs.get(FINGERPRINT)
        if stored_text is None:
            self._study.set_user_attr(FINGERPRINT, json.dumps(fingerprint, sort_keys=True))
            return
        stored, wanted = json.loads(stored_text), json.loads(json.dumps(fingerprint))
        keys = stored.keys() | wanted.keys()
        different = sorted(key for key in keys if stored.get(key) != wanted.get(key))
        if different:
            raise StudyError(
                f"study {self.name!r} was made with other settings ({', '.join(different)}): its "
                "scores cannot be compared; use those settings or another --study-name"
            )

    def _end_abandoned(self) -> bool:
        """End trials whose owner is gone; whether there were any."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        abandoned = [trial for trial in running if _is_abandoned(trial)]
        for trial in abandoned:
            self._interrupt(optuna.Trial(self._study, trial._trial_id))
        return bool(abandoned)

    def _interrupt(self, trial: optuna.Trial) -> None:
        """End a trial without an outcome, unless it is over."""
        if self._study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            return
        try:
            trial.set_user_attr(ERROR, INTERRUPTED)
            self._study.tell(trial.number, state=TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            pass  # another process was faster


def stored_batch_size(storage: BaseStorage, name: str) -> int | None:
    """The batch size that a study was begun with; None where there is no such study.

    Raises:
        StudyError: the storage cannot be read.
    """
    try:
        if name not in optuna.get_all_study_names(storage):
            return None
        attributes = optuna.load_study(study_name=name, storage=storage).user_attrs
    except Exception as error:  # each storage raises its own
        raise StudyError(f"cannot open study {name!r}: {_reason(error)}") from error
    stored = attributes.get(BATCH_SIZE)
    return None if stored is None else int(stored)


def _is_refined(record: TrialRecord) -> bool:
    return record.edit is not None and record.edit.refinement is not None


def _renew(trials: Sequence[optuna.Trial]) -> None:
    for trial in trials:
        _set(trial, lease_attributes())


def _set(trial: optuna.Trial, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def _is_abandoned(trial: FrozenTrial) -> bool:
    started = None if trial.datetime_start is None else trial.datetime_start.timestamp()
    return is_abandoned(trial.user_attrs, started)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
