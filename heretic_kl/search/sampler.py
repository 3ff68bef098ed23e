"""Which parameters come next. A trial's random numbers depend on the seed and its number alone.

A sampler that is seeded once and resumed draws the numbers of its first trials again. Here every
trial has a generator of its own, so a study that was interrupted and continued draws what it would
have drawn, and never the same twice.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

ERROR = "error"
INTERRUPTED = "interrupted"
"""A trial's attribute for its error, and what stands there where a trial was not finished."""


class NumberedSampler(BaseSampler):
    """`startup_trials` drawn at random, then multivariate tree-structured Parzen estimators.

    Source: Bergstra et al. 2011; for several objectives Ozaki et al. 2020.
    """

    def __init__(self, seed: int, startup_trials: int) -> None:
        self._seed = seed
        self._startup_trials = startup_trials
        self._current: tuple[int, BaseSampler] | None = None

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Parameters that are drawn together."""
        return self._of(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Draw them."""
        return self._of(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw one parameter that is not among them."""
        sampler = self._of(study, trial)
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def _of(self, study: Study, trial: FrozenTrial) -> BaseSampler:
        if self._current is None or self._current[0] != trial.number:
            earlier = study.get_trials(deepcopy=False)[: trial.number]
            finished = sum(1 for other in earlier if _is_finished(other))
            sampler = trial_sampler(self._seed, trial.number, finished, self._startup_trials)
            self._current = trial.number, sampler
        return self._current[1]


def trial_sampler(seed: int, number: int, finished: int, startup_trials: int) -> BaseSampler:
    """The sampler for one trial; `finished` trials are there to learn from."""
    own_seed = trial_seed(seed, number)
    if finished < startup_trials:
        return RandomSampler(seed=own_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=own_seed, multivariate=True, n_startup_trials=0, n_ei_candidates=64)


def quiet_optuna() -> None:
    """Have Optuna log errors only, for the whole process: a program may decide that, no library."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def trial_seed(seed: int, number: int) -> int:
    """A 32-bit seed for one trial, unrelated to its neighbours'."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _is_finished(trial: FrozenTrial) -> bool:
    if trial.state not in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
        return False
    return trial.user_attrs.get(ERROR) != INTERRUPTED
