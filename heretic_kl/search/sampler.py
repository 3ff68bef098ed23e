"""Which parameters come next. Random numbers depend on the seed, the trial's number and the worker.

A sampler that is seeded once and resumed draws the numbers of its first trials again. Here every
draw has a generator of its own, so a study that was interrupted and continued draws what it would
have drawn, and never the same twice. Drawing writes nothing: a trial is stored with its
parameters, at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Container, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.search.storage.pieces import whole

GAUSSIAN_TRIALS = 100
"""As long as there are no more to learn from, a Gaussian process chooses. Its cost grows."""
FEWEST_TO_LEARN_FROM = 3
STOPPED = "stopped"
"""A trial's attribute for why it was stopped, and the best that its objectives could have been."""
REFINEMENT = "refinement"
"""A trial's attribute for what was learned: its values are not those of its parameters."""
ERROR = "error"
INTERRUPTED = "interrupted"
"""A trial's attribute for its error, and what stands there where a trial was not finished."""


class Drawer:
    """`startup_trials` at random, then a Gaussian process, then Parzen estimators.

    - Gaussian processes for objectives and constraints, and the expected growth of the feasible
      hypervolume (Daulton et al. 2020), up to `GAUSSIAN_TRIALS`. They see normal scores: quantiles
      of ranks, which a few very large divergences do not bend. A stopped trial counts with the
      best that it could have been.
    - Multivariate tree-structured Parzen estimators from then on (Bergstra et al. 2011; for several
      objectives Ozaki et al. 2020).

    Trials that run are counted by both, so that several workers do not draw the same. Refined ones
    are shown to neither, as their values are not those of their parameters. Where the best sampler
    returns to an edit that was drawn before, the next one chooses, at last at random.
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
        drawn_before = [trial.params for trial in trials]
        trials = undisturbed(trials)
        seed = trial_seed(self._seed, len(trials), worker)
        trials = [trial for trial in trials if REFINEMENT not in trial.user_attrs]
        samplers = [self._sampler(trials, seed), _parzen_sampler(seed), RandomSampler(seed=seed)]
        for sampler in samplers:  # a measurement repeats exactly: no edit is worth a second one
            parameters = self._sample(sampler, trials, distributions)
            if parameters not in drawn_before:
                break
        return parameters

    def _sampler(self, trials: list[FrozenTrial], seed: int) -> BaseSampler:
        if sum(map(is_finished, trials)) < self._startup_trials:
            return RandomSampler(seed=seed)
        if FEWEST_TO_LEARN_FROM <= len(normal_scores(trials)) <= GAUSSIAN_TRIALS:
            return GPSampler(seed=seed, n_startup_trials=0)
        return _parzen_sampler(seed)

    def _sample(
        self,
        sampler: BaseSampler,
        trials: list[FrozenTrial],
        distributions: Mapping[str, BaseDistribution],
    ) -> dict[str, Any]:
        self._snapshot.trials = trials
        if isinstance(sampler, GPSampler):
            running = [trial for trial in trials if trial.state == TrialState.RUNNING]
            self._snapshot.trials = [*normal_scores(trials), *running]
        study = optuna.Study(_Snapshot.NAME, self._snapshot, sampler)
        trial = optuna.create_trial(state=TrialState.RUNNING)
        trial.number = 1 + max((t.number for t in trials), default=-1)
        space = sampler.infer_relative_search_space(study, trial)
        drawn = sampler.sample_relative(study, trial, space)
        for name, distribution in distributions.items():
            if name not in drawn:
                drawn[name] = sampler.sample_independent(study, trial, name, distribution)
        return {name: drawn[name] for name in distributions}


def undisturbed(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials in the order that they would have if none had been interrupted.

    One that was interrupted is left out, and the one that measures the same parameters stands
    where that one stood. So a study that was interrupted draws what it would have drawn.
    """
    places: dict[frozenset[tuple[str, Any]], int] = {}
    for place, trial in enumerate(trials):
        if trial.state.is_finished() and not is_finished(trial):
            places.setdefault(frozenset(trial.params.items()), place)
    if not places:
        return trials
    standing = (
        (min(place, places.get(frozenset(trial.params.items()), place)), place)
        for place, trial in enumerate(trials)
        if is_finished(trial) or not trial.state.is_finished()
    )
    return [trials[place] for _, place in sorted(standing)]


def normal_scores(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials to learn from, with normal scores in the place of values and of constraints' excesses.

    Order is kept, and so is which excesses are above 0. Left out are trials without values, or
    without a constraint that others have.
    """
    valued = [(trial, values) for trial in trials if (values := _values(trial)) is not None]
    names = list(dict.fromkeys(name for trial, _ in valued for name in trial.constraints))
    valued = [pair for pair in valued if all(name in pair[0].constraints for name in names)]
    if not valued:
        return []
    columns = [_scores(column) for column in zip(*(values for _, values in valued), strict=True)]
    excesses = {}
    for name in names:
        *scores, limit = _scores([*(trial.constraints[name] for trial, _ in valued), 0.0])
        excesses[name] = [score - limit for score in scores]
    scored = []
    for index, (trial, _) in enumerate(valued):
        scored.append(
            optuna.create_trial(
                values=[column[index] for column in columns],
                params=trial.params,
                distributions=trial.distributions,
                constraints={name: excesses[name][index] for name in names},
            )
        )
        scored[-1].number = trial.number
    return scored


def _values(trial: FrozenTrial) -> tuple[float, ...] | None:
    """Objectives, or the best that those of a stopped trial could have been; None: not known."""
    if trial.state == TrialState.COMPLETE:
        return tuple(trial.values)
    if trial.state != TrialState.PRUNED or STOPPED not in trial.user_attrs:
        return None
    best = json.loads(whole(trial.user_attrs, STOPPED))["at_best"]
    finite = all(value is not None and math.isfinite(value) for value in best)
    return tuple(map(float, best)) if finite else None


def _scores(values: Sequence[float]) -> list[float]:
    """Normal quantiles of ranks; equal values have the same."""
    ordered, normal = sorted(values), NormalDist()
    middle = (bisect_left(ordered, value) + bisect_right(ordered, value) for value in values)
    return [normal.inv_cdf(place / 2 / len(ordered)) for place in middle]


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


def _parzen_sampler(seed: int) -> TPESampler:
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
