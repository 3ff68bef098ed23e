"""Beginning and ending a trial, each as one call and one transaction where a storage can do that.

A database and the proxy in front of one have the methods `begin_trial` and `end_trial`. Any other
storage, such as a journal file, is asked in Optuna's own calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

CALL = "heretic-kl:call"
"""System attribute of a trial that was created here: which call created it."""


def stored_whole(trial: FrozenTrial) -> bool:
    """Whether nothing of a trial changes while its state stays, but its user attributes.

    Trials with parameters that were created here have had all of them since.
    """
    return bool(trial.params) and CALL in trial.system_attrs and not trial.state.is_finished()


def begin_trial(
    storage: BaseStorage, study_id: int, template: FrozenTrial, since: int
) -> list[FrozenTrial]:
    """Create a trial.

    Args:
        storage: of the study.
        study_id: the study in it.
        template: parameters, attributes and state of the trial.
        since: a number that no later trial is below: how many there were at the last look.

    Returns:
        The trials that were created since, by number, this one last.
    """
    if hasattr(storage, "begin_trial"):
        return list(storage.begin_trial(study_id, template, since))
    return begin_by_calls(storage, study_id, template, since)


def begin_by_calls(
    storage: BaseStorage, study_id: int, template: FrozenTrial, since: int
) -> list[FrozenTrial]:
    """The same in Optuna's calls."""
    trial_id = storage.create_new_trial(study_id, template)
    begun = storage.get_trial(trial_id)
    if since >= begun.number:
        return [begun]
    return storage.get_all_trials(study_id, deepcopy=False)[since : begun.number + 1]


def end_trial(
    storage: BaseStorage, study_id: int, trial: FrozenTrial, notes: Mapping[str, Any]
) -> None:
    """Store a trial's attributes, its values, and last its state; then notes.

    Args:
        storage: of the study.
        study_id: the study in it.
        trial: by its identifier, with what is to be stored. Parameters are in the storage.
        notes: system attributes of the study.

    Raises:
        UpdateFinishedTrialError: it is over. Nothing is stored.
    """
    if hasattr(storage, "end_trial"):
        storage.end_trial(study_id, trial, notes)
    else:
        end_by_calls(storage, study_id, trial, notes)


def end_by_calls(
    storage: BaseStorage, study_id: int, trial: FrozenTrial, notes: Mapping[str, Any]
) -> None:
    """The same in Optuna's calls."""
    for name, value in trial.user_attrs.items():
        storage.set_trial_user_attr(trial._trial_id, name, value)
    for name, value in trial.system_attrs.items():
        storage.set_trial_system_attr(trial._trial_id, name, value)
    storage.set_trial_state_values(trial._trial_id, trial.state, trial.values)
    for name, value in notes.items():
        storage.set_study_system_attr(study_id, name, value)
