"""One study: its trials so far, and the loop that runs more. Measures nothing itself.

Any number of processes may run the same study at the same time: what each does is stored at once,
and whatever one leaves undone another one does.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.ablation import EditParameters, Refinement
from heretic_kl.errors import StorageLostError, StudyError
from heretic_kl.ranks import check_together, from_first, held_by_first, on_first
from heretic_kl.scoring import Score, ScorerSpec, Stopped
from heretic_kl.search.fingerprint_check import (
    BATCH_SIZE,
    check_before,
    check_fingerprint,
    other_versions,
    reason,
)
from heretic_kl.search.pareto import pareto_front
from heretic_kl.search.progress.dashboard import name_objectives, trial_notes
from heretic_kl.search.records import (
    SECONDS,
    Outcome,
    Outcomes,
    TrialRecord,
    error_attributes,
    one_line,
    read_record,
    refinement_attributes,
    scores_from_json,
    scores_to_json,
    tested_prefix,
)
from heretic_kl.search.sampler import Drawer, is_finished
from heretic_kl.search.space import (
    REFINE,
    SearchSpace,
    refinement_distributions,
    refinement_parameters,
)
from heretic_kl.search.storage import Heartbeat, Roles, Watch
from heretic_kl.search.storage.pieces import in_pieces, keep, whole
from heretic_kl.search.trials import (
    RunningTrial,
    StudyTrials,
    count_finished,
    count_open,
    next_pause,
)

JUDGING = "heretic-kl:judging:"
"""Attribute of a study, followed by an arbitrary name: what one process had judged."""
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
        test_tokens: N of the KL on test prompts, where it is another one than in trials.
        versions: of what trials are measured with, where they do not forbid a comparison.

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
        versions: Mapping[str, str] | None = None,
        test_tokens: int | None = None,
    ) -> None:
        self.name = name
        self._test_scores = tested_prefix(test_tokens)
        self._space = space
        self._outcomes = Outcomes(objectives, limits or {})
        self._records: dict[int, TrialRecord] = {}
        self._measuring: tuple[int, ...] = ()
        self._noted: tuple[FrozenTrial, TrialRecord] | None = None
        self._storage = storage
        heartbeat, watch = Heartbeat(storage), Watch(storage)
        try:
            from_first(lambda: check_before(storage, name, fingerprint))
            self._study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=["minimize"] * len(objectives),
                load_if_exists=True,
                sampler=optuna.samplers.RandomSampler(),  # never asked: see `Drawer`
            )
            self._roles = Roles(storage, name, heartbeat, watch)
        except StudyError:
            raise
        except Exception as error:  # each storage raises its own
            raise StudyError(f"cannot open study {name!r}: {reason(error)}") from error
        self._trials = StudyTrials(
            storage,
            self._study._study_id,
            space=space,
            drawer=Drawer(seed, startup_trials, len(objectives)),
            roles=self._roles,
            heartbeat=heartbeat,
            watch=watch,
        )
        with self.sole("opening"):
            from_first(lambda: check_fingerprint(self._study, fingerprint))
            name_objectives(self._study, [spec.name for spec in objectives])
            if batch_size is not None and BATCH_SIZE not in self._study.user_attrs:
                self._study.set_user_attr(BATCH_SIZE, batch_size)
            self.other_versions = from_first(lambda: other_versions(self._study, versions or {}))
            """What differs from the versions that it was begun with, in words; empty: nothing."""
        self._before = from_first(lambda: set(self._study.user_attrs))
        self._trials.settle(queue=False)

    @property
    def records(self) -> tuple[TrialRecord, ...]:
        """Every trial that was started and is over, by number; each is parsed once."""
        trials = self._trials.read()
        return tuple(self._record(trial) for trial in trials if trial.state.is_finished())

    @property
    def front(self) -> tuple[TrialRecord, ...]:
        """The Pareto front, by the first objective."""
        return pareto_front(self.records)

    @property
    def finished(self) -> int:
        """Trials that ran to an end, stopped and failed ones included, interrupted ones not.

        Refined trials are not among them: see `refined`.
        """
        return count_finished(self._trials.read())

    @property
    def refined(self) -> tuple[TrialRecord, ...]:
        """Trials whose edit was learned, by number; without those of its other strengths."""
        return tuple(r for r in self.records if r.refinement and r.refinement.of is None)

    @property
    def places(self) -> list[int]:
        """Of the trials that `evaluate` is given now, in order; see `StudyTrials.places`."""
        return self._trials.places(self._measuring)

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
        attributes = self._outcomes.attributes(outcome)
        assert not isinstance(outcome, Stopped)  # nothing races against it
        start_distributions = self._trials.read()[start.number].distributions
        distributions = {n: d for n, d in start_distributions.items() if not n.startswith(REFINE)}
        parameters = {name: start.parameters[name] for name in distributions}
        template = optuna.create_trial(
            values=self._outcomes.values(outcome),
            params={**parameters, **refinement_parameters(refinement)},
            distributions={**distributions, **refinement_distributions()},
            constraints=self._outcomes.excesses(outcome),
            user_attrs=in_pieces(
                {SECONDS: seconds, **refinement_attributes(refinement), **attributes}
            ),
        )
        return self._ended(self._trials.add(template, self._notes))

    def sole(self, role: str) -> AbstractContextManager[None]:
        """A block that one process at a time is in, of all that have opened the study."""
        return held_by_first(lambda: self._roles.hold(role))

    def run(
        self,
        until: int,
        evaluate: Evaluate,
        *,
        candidates: int = 1,
        notify: Notify = lambda message: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[TrialRecord]:
        """Run trials until the study holds `until` finished ones, whoever runs them.

        Trials that other processes run count as done until they turn out not to be. A trial that
        raises is recorded as failed, with its traceback, and the search goes on. Where several
        candidates cannot be measured together, each is measured alone.

        Args:
            until: finished trials to hold in the end.
            evaluate: measures the edits of several trials.
            candidates: K, how many it is given at a time, the last ones aside. The sampler draws
                them without knowing each other's scores.
            notify: told, in words, when several could not be measured together.
            stop: asked before trials are begun; True ends the search.

        Yields:
            A record a trial, as it finishes, those of other processes included.

        Raises:
            StudyError: several trials in a row failed.
        """
        with held_by_first(lambda: self._roles.hold_numbered("worker")) as worker:
            failures, pause = 0, 0.0
            seen = {t.number for t in self._trials.read() if t.state.is_finished()}
            while not stop():
                trials = self._trials.settle()
                yield from self._unseen(trials, seen)
                missing = until - count_finished(trials)
                if missing <= 0:
                    return
                running_now = sum(1 for t in trials if t.state == TrialState.RUNNING)
                free = missing - running_now
                if free <= 0:
                    pause = next_pause(pause, running_now)
                    time.sleep(pause)
                    continue
                pause = 0.0
                running = self._begin(trials, min(candidates, free), until, worker)
                for record in self._run_group(running, evaluate, notify):
                    seen.add(record.number)
                    failures = failures + 1 if record.state == "failed" else 0
                    yield record
                    if failures >= MOST_FAILURES_IN_A_ROW:
                        last = f"the last: {record.error}"
                        raise StudyError(f"{failures} trials in a row failed; {last}")

    def _unseen(self, trials: Sequence[FrozenTrial], seen: set[int]) -> Iterator[TrialRecord]:
        """Records of trials that other processes have finished meanwhile."""
        for trial in trials:
            if is_finished(trial) and trial.number not in seen:
                seen.add(trial.number)
                yield self._record(trial)

    @on_first
    def test_scores(self, number: int) -> dict[str, Score] | None:
        """A trial's scores on the test prompts, if they were measured."""
        stored = whole(self._study.user_attrs, f"{self._test_scores}{number}")
        return None if stored is None else scores_from_json(stored)

    @on_first
    def keep_test_scores(self, number: int, scores: Mapping[str, Score]) -> None:
        """Keep a trial's scores on the test prompts; `UNEDITED` counts as one."""
        keep(self._study, f"{self._test_scores}{number}", scores_to_json(scores))

    @on_first
    def keep_judging(self, used: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep what this process had judged, by scorer, for the one that began the run."""
        self._study.set_user_attr(f"{JUDGING}{uuid.uuid4().hex}", json.dumps(used))

    @on_first
    def judged_elsewhere(self) -> list[dict[str, dict[str, Any]]]:
        """What other processes have kept since this one opened the study."""
        return [
            json.loads(text)
            for name, text in self._study.user_attrs.items()
            if name.startswith(JUDGING) and name not in self._before
        ]

    # --- running -----------------------------------------------------------------------------

    def _begin(
        self, trials: list[FrozenTrial], count: int, until: int, worker: int
    ) -> list[RunningTrial]:
        """Begin trials, but no more than the study needs whatever other processes just began."""
        running: list[RunningTrial] = []
        try:
            while len(running) < count:
                running.append(self._trials.begin(trials, worker))
                number = running[-1].number
                # What was begun since they were read has a number in between.
                others = count_open(trials) - (number < len(trials)) + max(0, number - len(trials))
                if count == 1 and count_finished(trials) + others < until:
                    break
                trials = self._trials.read()
                before = [t for t in trials[:number] if t.state == TrialState.RUNNING]
                if count_finished(trials) + len(before) >= until:
                    self._trials.hand_back(running.pop())
                    break
        except BaseException:
            for trial in running:
                self._trials.hand_back(trial)
            raise
        return running

    def _run_group(
        self, running: list[RunningTrial], evaluate: Evaluate, notify: Notify
    ) -> Iterator[TrialRecord]:
        """Measure trials and tell; what does not get that far is handed back."""
        try:
            edits = [(trial.number, self._space.edit(trial.parameters)) for trial in running]
            for result in self._measure(edits, evaluate, notify) if edits else ():
                trial = self._tell(running[0], result)
                running.pop(0)
                yield self._ended(trial)
        finally:
            for left in running:
                self._trials.hand_back(left)

    def _measure(
        self, edits: Sequence[tuple[int, EditParameters]], evaluate: Evaluate, notify: Notify
    ) -> Iterator[_Measured]:
        """Measure edits together; where that fails, one by one, so that each fails for itself."""
        start = time.perf_counter()
        self._measuring = tuple(number for number, _ in edits)
        try:
            outcomes = list(evaluate([edit for _, edit in edits]))
            for outcome in outcomes:
                self._outcomes.attributes(outcome)  # raise now what storing it would raise
        except StorageLostError:  # `evaluate` reads the study: no fault of the edit
            raise
        except Exception as error:  # plug-ins and drivers may raise anything
            check_together()
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

    def _tell(self, trial: RunningTrial, measured: _Measured) -> FrozenTrial:
        attributes: dict[str, Any] = {SECONDS: measured.seconds}
        outcome = measured.outcome
        if outcome is None:
            assert measured.error is not None
            attributes |= error_attributes(measured.error)
            return self._trials.end(trial, TrialState.FAIL, attributes, notes=self._notes)
        return self._trials.end(
            trial,
            # Pruned trials have no value: to Parzen estimators they are worse than finished ones.
            TrialState.PRUNED if isinstance(outcome, Stopped) else TrialState.COMPLETE,
            attributes | self._outcomes.attributes(outcome),
            values=None if isinstance(outcome, Stopped) else self._outcomes.values(outcome),
            excesses=self._outcomes.excesses(outcome),
            notes=self._notes,
        )

    def _notes(self, trial: FrozenTrial) -> dict[str, Any]:
        self._noted = trial, read_record(trial, self._space)
        return trial_notes(trial._trial_id, self._noted[1])

    def _ended(self, trial: FrozenTrial) -> TrialRecord:
        """The record of a trial that is over; that of its note, unless another process ended it."""
        if self._noted is not None and self._noted[0] is trial:
            self._records[trial.number] = self._noted[1]
        return self._record(trial)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        if trial.number not in self._records:
            self._records[trial.number] = read_record(trial, self._space)
        return self._records[trial.number]
