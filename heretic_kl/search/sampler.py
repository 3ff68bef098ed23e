"""Which parameters come next. Random numbers depend on the seed, the trial's number and the worker.

A sampler that is seeded once and resumed draws the numbers of its first trials again. Here every
draw has a generator of its own, so a study that was interrupted and continued draws what it would
have drawn, and never the same twice. Drawing writes nothing: a trial is stored with its
parameters, at once.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Container, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

ERROR = "error"
INTERRUPTED = "interrupted"
"""A trial's attribute for its error, and what stands there where a trial was not finished."""


class Drawer:
    """`startup_trials` drawn at random, then multivariate tree-structured Parzen estimators.

    Trials that run count as bad ones where they are (constant liar), so that several workers do
    not draw the same. Source: Bergstra et al. 2011; for several objectives Ozaki et al. 2020.
    """

    def __init__(self, seed: int, startup_trials: int, objectives: int) -> None:
        self._seed, self._startup_trials = seed, startup_trials
        self._snapshot = _Snapshot()
        directions = [optuna.study.StudyDirection.MINIMIZE] * objectives
        self._snapshot.create_new_study(directions, _Snapshot.NAME)

    def draw(
        self,
        trials: list[FrozenTrial],
        distributions: Mapping[str, BaseDistribution],
        worker: int,
    ) -> dict[str, Any]:
        """Parameters of one more trial.

        Args:
            trials: all that there are, by number.
            distributions: what may be drawn, in order.
            worker: no two that draw at the same time have the same number.
        """
        finished = sum(1 for trial in trials if is_finished(trial))
        seed = trial_seed(self._seed, len(trials), worker)
        sampler = trial_sampler(seed, finished, self._startup_trials)
        self._snapshot.trials = trials
        study = optuna.Study(_Snapshot.NAME, self._snapshot, sampler)
        trial = optuna.create_trial(state=TrialState.RUNNING)
        trial.number = len(trials)
        space = sampler.infer_relative_search_space(study, trial)
        drawn = sampler.sample_relative(study, trial, space)
        for name, distribution in distributions.items():
            if name not in drawn:
                drawn[name] = sampler.sample_independent(study, trial, name, distribution)
        return {name: drawn[name] for name in distributions}


class _Snapshot(InMemoryStorage):
    """Trials as they were read once, for a sampler to look at; takes nothing in."""

    NAME = "snapshot"

    def __init__(self) -> None:
        super().__init__()
        self.trials: list[FrozenTrial] = []

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Those in one of the states; never copied."""
        return [trial for trial in self.trials if states is None or trial.state in states]

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """The sampler would tell other processes what it drew; they see the trial instead."""


def trial_sampler(seed: int, finished: int, startup_trials: int) -> BaseSampler:
    """The sampler for one trial; `finished` trials are there to learn from."""
    if finished < startup_trials:
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(
            seed=seed,
            multivariate=True,
            n_startup_trials=0,
            n_ei_candidates=64,
            constant_liar=True,
        )


def quiet_optuna() -> None:
    """Have Optuna log errors only, for the whole process: a program may decide that, no library."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def trial_seed(seed: int, number: int, worker: int = 0) -> int:
    """A 32-bit seed for one trial of one worker, unrelated to its neighbours'."""
    text = f"{seed}:{number}" + (f":{worker}" if worker else "")
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def is_finished(trial: FrozenTrial) -> bool:
    """Whether a trial ran to an end, be it a failure."""
    return trial.state.is_finished() and trial.user_attrs.get(ERROR) != INTERRUPTED
