"""Which parameters come next. A trial's random numbers depend on the seed and its number alone.

A sampler that is seeded once and resumed draws the numbers of its first trials again. Here every
trial has its own generator, so a study that was interrupted and continued draws what it would
have drawn, and never the same twice.
"""

from __future__ import annotations

import hashlib
import warnings

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler


def trial_sampler(seed: int, number: int, finished: int, startup_trials: int) -> BaseSampler:
    """The sampler for one trial.

    Args:
        seed: the study's.
        number: the trial's.
        finished: trials finished so far.
        startup_trials: random trials before the sampler starts to learn.

    Returns:
        Uniform random sampling at first, then multivariate tree-structured Parzen estimators
        (Bergstra et al. 2011; Ozaki et al. 2020 for several objectives).
    """
    own = trial_seed(seed, number)
    if finished < startup_trials:
        return RandomSampler(seed=own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=own, multivariate=True, n_startup_trials=0, n_ei_candidates=64)


def trial_seed(seed: int, number: int) -> int:
    """A 32-bit seed for one trial, unrelated to its neighbours'."""
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")
