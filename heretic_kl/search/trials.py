"""Begins, ends and hands back the trials of one study, whoever else works on it. Measures nothing.

A trial is stored with its parameters and its owner's lease at once. One that was begun and never
measured is queued again with the same parameters: those of a worker that died, those that were
handed back, and the edits that every study starts with.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.ranks import on_first
from heretic_kl.search.sampler import (
    ERROR,
    INTERRUPTED,
    REFINEMENT,
    Drawer,
    is_finished,
    undisturbed,
)
from heretic_kl.search.space import SearchSpace
from heretic_kl.search.storage import Heartbeat, Roles, Watch, lease_attributes
from heretic_kl.search.storage.pieces import in_pieces
from heretic_kl.search.storage.steps import begin_trial, end_trial

ABANDONED = "abandoned"
"""Attribute of a trial whose owner died."""
MOST_DEATHS = 5
"""So many processes die over an edit before it counts as failed."""
QUEUE_ROLE = "queue"
WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 2.0
"""Between two looks at the trials that other processes run, where none is left to begin."""
WAIT_SECONDS_A_TRIAL, LONGEST_OF_ALL = 0.2, 10.0
"""Waits grow with the trials that run: each look reads all of them, of each worker."""


class RunningTrial(NamedTuple):
    """A trial that this process holds."""

    id: int
    number: int
    parameters: dict[str, Any]


class StudyTrials:
    """The trials of one study. Of several processes with one model the first one has them.

    Args:
        storage: of the study.
        study_id: the study in it.
        space: what trials may vary.
        drawer: chooses parameters.
        roles: of the study.
        heartbeat: renews the leases of this process.
        watch: tells which owners are gone.
    """

    def __init__(
        self,
        storage: BaseStorage,
        study_id: int,
        *,
        space: SearchSpace,
        drawer: Drawer,
        roles: Roles,
        heartbeat: Heartbeat,
        watch: Watch,
    ) -> None:
        self._storage, self._study_id = storage, study_id
        self._distributions, self._starts = space.distributions, space.known_good()
        self._drawer, self._roles = drawer, roles
        self._heartbeat, self._watch = heartbeat, watch
        self._edits: dict[int, str] = {}

    @on_first
    def read(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._storage.get_all_trials(self._study_id, deepcopy=False)

    def places(self, numbers: Sequence[int]) -> list[int]:
        """Where trials stand in the order in which none was interrupted, from 0.

        An edit that is measured again stands where it was interrupted.
        """
        places = {trial.number: place for place, trial in enumerate(undisturbed(self.read()))}
        return [places.get(number, number) for number in numbers]

    @on_first
    def settle(self, *, queue: bool = True) -> list[FrozenTrial]:
        """End what nobody runs any more, queue what was never measured; return all trials."""
        trials = self.read()
        if self._end_abandoned(trials):
            trials = self.read()
        if queue and any(self._unmeasured(trials)):
            with self._roles.hold(QUEUE_ROLE):
                for parameters in self._unmeasured(self.read()):
                    queued = self._template(TrialState.WAITING, parameters, {})
                    self._storage.create_new_trial(self._study_id, queued)
            trials = self.read()
        return trials

    @on_first
    def begin(self, trials: list[FrozenTrial], worker: int) -> RunningTrial:
        """Take the first trial of the queue, or draw a new one.

        Args:
            trials: all that there are, by number.
            worker: see `Drawer.draw`.
        """
        for trial in trials:
            if trial.state == TrialState.WAITING and self._take(trial._trial_id):
                return RunningTrial(trial._trial_id, trial.number, trial.params)
        while True:
            parameters = self._drawer.draw(trials, self._distributions, worker)
            template = self._template(TrialState.RUNNING, parameters, lease_attributes())
            *since, begun = begin_trial(self._storage, self._study_id, template, len(trials))
            self._heartbeat.add(begun._trial_id)
            running = RunningTrial(begun._trial_id, begun.number, parameters)
            if all(t.params != parameters for t in (*trials[: begun.number], *since)):
                return running
            self.hand_back(running)  # another worker drew the same at the same time
            trials = self.read()

    @on_first
    def end(
        self,
        trial: RunningTrial,
        state: TrialState,
        attributes: Mapping[str, Any],
        *,
        values: Sequence[float] | None = None,
        excesses: Mapping[str, float] | None = None,
        notes: Callable[[FrozenTrial], Mapping[str, Any]] = lambda trial: {},
    ) -> FrozenTrial:
        """Store what came of a trial, its state last: once that is stored, all of it is.

        Where another process took this one for dead and ended the trial, that stands.

        Args:
            trial: of this process.
            state: in which it ends.
            attributes: JSON-ready; long ones are cut.
            values: of the objectives.
            excesses: by how much it exceeds its limits.
            notes: what the study keeps of the ended trial, as system attributes.

        Returns:
            What stands.
        """
        ended = optuna.create_trial(
            state=TrialState.FAIL,
            user_attrs=in_pieces(attributes),
            constraints=dict(excesses or {}),
        )
        ended.number, ended._trial_id, ended.params = trial.number, trial.id, trial.parameters
        ended.state, ended.values = state, None if values is None else list(map(float, values))
        try:
            end_trial(self._storage, self._study_id, ended, notes(ended))
        except UpdateFinishedTrialError:
            return self._storage.get_trial(trial.id)
        finally:
            self._heartbeat.remove(trial.id)
        return ended

    @on_first
    def add(
        self, template: FrozenTrial, notes: Callable[[FrozenTrial], Mapping[str, Any]]
    ) -> FrozenTrial:
        """Store a trial that is over, and what the study keeps of it."""
        trial_id = self._storage.create_new_trial(self._study_id, template)
        trial = self._storage.get_trial(trial_id)
        for name, value in notes(trial).items():
            self._storage.set_study_system_attr(self._study_id, name, value)
        return trial

    @on_first
    def hand_back(self, trial: RunningTrial) -> FrozenTrial:
        """End a trial without an outcome, unless it is over."""
        return self.end(trial, TrialState.FAIL, {ERROR: INTERRUPTED})

    def _template(
        self, state: TrialState, parameters: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> FrozenTrial:
        return optuna.create_trial(
            state=state,
            params=dict(parameters),
            distributions={name: self._distributions[name] for name in parameters},
            user_attrs=dict(attributes),
        )

    def _take(self, trial_id: int) -> bool:
        """Whether a queued trial is now ours: only one process gets it."""
        try:
            if not self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return False
            for name, value in lease_attributes().items():
                self._storage.set_trial_user_attr(trial_id, name, value)
        except UpdateFinishedTrialError:
            return False
        self._heartbeat.add(trial_id)
        return True

    def _end_abandoned(self, trials: Sequence[FrozenTrial]) -> bool:
        """End trials whose owner is gone; whether there were any."""
        abandoned = [
            trial
            for trial in trials
            if (trial.state == TrialState.RUNNING and self._watch.abandoned(trial))
            or (trial.state == TrialState.WAITING and not trial.params)  # of an older version
        ]
        deaths = Counter(self._edit(t) for t in trials if t.user_attrs.get(ABANDONED))
        for trial in abandoned:
            many = deaths[self._edit(trial)] + 1 >= MOST_DEATHS
            error = f"the process died, {MOST_DEATHS} times in all" if many else INTERRUPTED
            running = RunningTrial(trial._trial_id, trial.number, trial.params)
            self.end(running, TrialState.FAIL, {ERROR: error, ABANDONED: True})
        return bool(abandoned)

    def _unmeasured(self, trials: Sequence[FrozenTrial]) -> Iterator[dict[str, Any]]:
        """Parameters that are neither measured nor queued nor being measured."""
        interrupted = [t for t in trials if t.state.is_finished() and not is_finished(t)]
        settled = {self._edit(t) for t in trials if is_finished(t) or not t.state.is_finished()}
        drawn = [t.params for t in interrupted if t.params.keys() == self._distributions.keys()]
        for parameters in (*self._starts, *drawn):
            if (edit := _as_text(parameters)) not in settled:
                settled.add(edit)
                yield dict(parameters)

    def _edit(self, trial: FrozenTrial) -> str:
        """A trial's parameters as text; they never change."""
        if trial.number not in self._edits:
            self._edits[trial.number] = _as_text(trial.params)
        return self._edits[trial.number]


def next_pause(pause: float, running: int) -> float:
    """Seconds until the next look at so many trials of other processes, after the last pause."""
    longest = min(WAIT_SECONDS_A_TRIAL * running, LONGEST_OF_ALL)
    shortest = max(WAIT_SECONDS, longest / 2)
    return min(max(1.3 * pause, shortest), max(LONGEST_WAIT_SECONDS, longest))


def _as_text(parameters: Mapping[str, Any]) -> str:
    return json.dumps(parameters, sort_keys=True)


def count_finished(trials: Sequence[FrozenTrial]) -> int:
    """Searched trials that ran to an end."""
    return sum(1 for t in trials if is_finished(t) and REFINEMENT not in t.user_attrs)


def count_open(trials: Sequence[FrozenTrial]) -> int:
    """Trials that wait or run."""
    return sum(1 for t in trials if not t.state.is_finished())
