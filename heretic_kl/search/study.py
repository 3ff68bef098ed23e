"""The ask-and-tell loop around Optuna: resumable, one record a trial. Runs no model itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.ablation import EditParameters
from heretic_kl.errors import HereticKLError, StudyError
from heretic_kl.scoring import Score, ScorerSpec, Stopped
from heretic_kl.search.owner import may_be_alive, this_process
from heretic_kl.search.pareto import pareto_front
from heretic_kl.search.records import TrialRecord
from heretic_kl.search.records import TrialState as TrialKind
from heretic_kl.search.sampler import INTERRUPTED, NumberedSampler
from heretic_kl.search.space import SearchSpace

FINGERPRINT = "heretic-kl:fingerprint"
TEST_SCORES = "heretic-kl:test:"
OWNER = "owner"
MOST_FAILURES_IN_A_ROW = 5

Outcome = Mapping[str, Score] | Stopped
Evaluate = Callable[[EditParameters], Outcome]
EvaluateTogether = Callable[[Sequence[EditParameters]], Sequence[Outcome]]


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
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.name = name
        self._space = space
        self._objectives = tuple(objectives)
        try:
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize"] * len(self._objectives),
                load_if_exists=True,
                sampler=NumberedSampler(seed, startup_trials),
            )
        except Exception as error:  # each storage raises its own
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise StudyError(f"cannot open study {name!r}: {first}") from error
        self._check_fingerprint(fingerprint)
        self._close_interrupted()

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """Every trial that was started and is over, by number."""
        over = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        trials = self._study.get_trials(deepcopy=False, states=over)
        return tuple(self._record(trial) for trial in trials)

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, by the first objective."""
        return pareto_front(self.records)

    @property
    def finished(self) -> int:
        """Trials that ran to an end, stopped and failed ones included, interrupted ones not."""
        return sum(1 for record in self.records if record.state != "interrupted")

    def run(
        self,
        until: int,
        evaluate: Evaluate,
        *,
        together: EvaluateTogether | None = None,
        at_once: int = 1,
        notify: Callable[[str], None] = lambda message: None,
    ) -> Iterator[TrialRecord]:
        """Run trials until the study holds `until` finished ones.

        A trial that raises is recorded as failed, with what it raised, and the search goes on.

        Args:
            until: finished trials to hold in the end.
            evaluate: measures one edit on the validation prompts.
            together: measures several side by side; where it raises, each is measured alone.
            at_once: how many, the last ones aside. The sampler draws them without knowing each
                other's scores.
            notify: told, in words, when several could not be measured side by side.

        Yields:
            A record a trial, as it finishes.

        Raises:
            StudyError: several trials in a row failed.
        """
        self._enqueue_known_good()
        failures = 0
        while self.finished < until:
            count = max(1, min(at_once, until - self.finished))
            for record in self._run_some(count, evaluate, together, notify):
                failures = failures + 1 if record.state == "failed" else 0
                yield record
                if failures >= MOST_FAILURES_IN_A_ROW:
                    raise StudyError(f"{failures} trials in a row failed; the last: {record.error}")

    def test_scores(self, number: int) -> dict[str, Score] | None:
        """A trial's scores on the test prompts, if they were measured."""
        stored = self._study.user_attrs.get(f"{TEST_SCORES}{number}")
        return None if stored is None else _scores_from_json(stored)

    def keep_test_scores(self, number: int, scores: Mapping[str, Score]) -> None:
        """Keep a trial's scores on the test prompts; `UNEDITED` counts as one."""
        self._study.set_user_attr(f"{TEST_SCORES}{number}", _scores_to_json(scores))

    def _enqueue_known_good(self) -> None:
        """Queue what is neither queued nor measured; an interrupted trial was not measured."""
        held = [
            dict(trial.system_attrs.get("fixed_params", trial.params))
            for trial in self._study.get_trials(deepcopy=False)
            if trial.user_attrs.get("error") != INTERRUPTED
        ]
        for parameters in self._space.known_good():
            if parameters not in held:
                self._study.enqueue_trial(parameters)

    def _run_some(
        self,
        count: int,
        evaluate: Evaluate,
        together: EvaluateTogether | None,
        notify: Callable[[str], None],
    ) -> Iterator[TrialRecord]:
        """Ask for trials, measure them, tell; what does not get that far is marked interrupted."""
        waiting: list[optuna.Trial] = []
        edits = []
        try:
            for _ in range(count):
                trial = self._study.ask()
                waiting.append(trial)
                trial.set_user_attr(OWNER, this_process())
                edits.append(self._space.edit(self._space.suggest(trial)))
            asked = list(waiting)
            start = time.perf_counter()
            outcomes = self._together(edits, together, notify)
            share = (time.perf_counter() - start) / count
            for index, trial in enumerate(asked):
                if outcomes is None:
                    self._measure(trial, edits[index], evaluate)
                else:
                    self._tell(trial, outcomes[index], share)
                waiting.remove(trial)
                yield self._record(self._study.get_trials(deepcopy=False)[trial.number])
        finally:
            known = self._study.get_trials(deepcopy=False)
            for trial in waiting:
                if not known[trial.number].state.is_finished():
                    trial.set_user_attr("error", INTERRUPTED)
                    self._study.tell(trial, state=TrialState.FAIL)

    def _together(
        self,
        edits: Sequence[EditParameters],
        together: EvaluateTogether | None,
        notify: Callable[[str], None],
    ) -> Sequence[Outcome] | None:
        """What came of several edits measured side by side; None: measure each alone."""
        if len(edits) == 1 or together is None:
            return None
        try:
            outcomes = together(edits)
            for each in outcomes:
                self._check(each)
        except Exception as error:  # one bad edit among them: alone, each fails for itself
            notify(f"{len(edits)} candidates are measured one by one: {_one_line(error)}")
            return None
        return outcomes

    def _measure(self, trial: optuna.Trial, edit: EditParameters, evaluate: Evaluate) -> None:
        start = time.perf_counter()
        try:
            outcome = evaluate(edit)
            self._check(outcome)
        except Exception as error:  # plug-ins and drivers may raise anything
            trial.set_user_attr("error", _one_line(error))
            trial.set_user_attr("seconds", time.perf_counter() - start)
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._tell(trial, outcome, time.perf_counter() - start)

    def _check(self, outcome: Outcome) -> None:
        """Raise now what storing it would raise."""
        if not isinstance(outcome, Stopped):
            self._values(outcome)
            _scores_to_json(outcome)

    def _tell(self, trial: optuna.Trial, outcome: Outcome, seconds: float) -> None:
        trial.set_user_attr("seconds", seconds)
        if isinstance(outcome, Stopped):
            # Pruned trials have no value: to the sampler they are worse than all finished ones.
            trial.set_user_attr("stopped", json.dumps(outcome.to_dict()))
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            trial.set_user_attr("scores", _scores_to_json(outcome))
            self._study.tell(trial, self._values(outcome))

    def _values(self, scores: Mapping[str, Score]) -> list[float]:
        values = []
        for spec in self._objectives:
            value = scores[spec.name].optimized
            assert value is not None  # the suite refuses objectives without a value
            values.append(-value if spec.role == "maximize" else value)
        return values

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        error = trial.user_attrs.get("error")
        stopped = trial.user_attrs.get("stopped")
        try:
            edit = self._space.edit(trial.params)
        except KeyError:
            edit = None  # interrupted before all parameters were drawn
        return TrialRecord(
            number=trial.number,
            state=_state(trial),
            parameters=dict(trial.params),
            edit=edit,
            scores=_scores_from_json(trial.user_attrs.get("scores", "{}")),
            objectives=tuple(trial.values or ()),
            seconds=float(trial.user_attrs.get("seconds", 0.0)),
            error=error,
            stopped=None if stopped is None else Stopped.from_dict(json.loads(stopped)),
        )

    def _check_fingerprint(self, fingerprint: Mapping[str, Any]) -> None:
        stored = self._study.user_attrs.get(FINGERPRINT)
        if stored is None:
            self._study.set_user_attr(FINGERPRINT, json.dumps(fingerprint, sort_keys=True))
            return
        known = json.loads(stored)
        ours = json.loads(json.dumps(fingerprint))
        different = sorted(k for k in known.keys() | ours.keys() if known.get(k) != ours.get(k))
        if different:
            raise StudyError(
                f"study {self.name!r} was made with other settings ({', '.join(different)}): its "
                "scores cannot be compared; use those settings or another --study-name"
            )

    def _close_interrupted(self) -> None:
        """End trials that a killed process left running."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if may_be_alive(trial.user_attrs.get(OWNER)):
                continue
            optuna.Trial(self._study, trial._trial_id).set_user_attr("error", INTERRUPTED)
            self._study.tell(trial.number, state=TrialState.FAIL)


def _state(trial: FrozenTrial) -> TrialKind:
    if trial.state == TrialState.COMPLETE:
        return "complete"
    if trial.state == TrialState.PRUNED:
        return "stopped"
    return "interrupted" if trial.user_attrs.get("error") == INTERRUPTED else "failed"


def _one_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, HereticKLError) else f"{type(error).__name__}: {text}"


def _scores_to_json(scores: Mapping[str, Score]) -> str:
    return json.dumps({name: score.to_dict() for name, score in scores.items()})


def _scores_from_json(text: str) -> dict[str, Score]:
    return {name: Score.from_dict(data) for name, data in json.loads(text).items()}
