"""Which parameters decide an objective, by Optuna's own estimate. Draws nothing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import optuna
from optuna.trial import FrozenTrial, TrialState

from heretic_kl.search.sampler import REFINEMENT

FEWEST_TRIALS = 10
"""Complete trials below which an estimate says nothing."""


def importances(trials: Sequence[FrozenTrial], objectives: int) -> list[dict[str, float]]:
    """Shares of importance by parameter, for each objective in order, largest first.

    PED-ANOVA (Watanabe et al. 2023), Optuna's default: how far the distribution of a parameter
    among the best tenth of the trials is from its distribution among all. Refined trials, whose
    parameters are their start's, are left out. [] where there are too few trials.
    """
    complete = [
        trial
        for trial in trials
        if trial.state == TrialState.COMPLETE and REFINEMENT not in trial.user_attrs
    ]
    if len(complete) < FEWEST_TRIALS:
        return []
    study = optuna.create_study(directions=["minimize"] * objectives)
    study.add_trials(complete)
    shares = []
    for index in range(objectives):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental; low values count, as they should
            of_objective = partial(_objective, index)
            shares.append(optuna.importance.get_param_importances(study, target=of_objective))
    return shares


def _objective(index: int, trial: FrozenTrial) -> float:
    return float(trial.values[index])
