"""A study read by plain rows holds what Optuna's own reading says."""

import math
from contextlib import nullcontext
from datetime import datetime

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from servers import database

from heretic_kl.search.storage.database import Database

SPACE = {
    "b": FloatDistribution(1e-3, 1, log=True),
    "a": IntDistribution(2, 8, step=2),
    "kind": CategoricalDistribution(("mild", None, 3, True)),
}


def fill(storage):
    """Two studies; the identifier of the first one."""
    study_id = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE] * 2, "first")
    other = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "second")
    for index, kind in enumerate(("mild", None, 3, True)):
        values = [math.inf, -math.inf] if index == 1 else [0.1 * index, 3.0]
        trial = create_trial(
            values=values,
            params={"b": 0.5, "a": 4, "kind": kind},
            distributions=SPACE,
            constraints={"limit": index - 1.5},
            user_attrs={"text": "naïve 文 \u0000"[: 5 + index], "list": [1, {"x": None}]},
        )
        storage.create_new_trial(study_id, trial)
        storage.create_new_trial(other, create_trial(value=1.0, user_attrs={"other": index}))
    for state in (TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED, TrialState.FAIL):
        parts = {"params": {"a": 2}, "distributions": {"a": SPACE["a"]}}
        pruned = {"intermediate_values": {0: 1.0, 7: math.nan, 9: math.inf}}
        trial = create_trial(state=state, **parts, **(pruned if state.name == "PRUNED" else {}))
        storage.create_new_trial(study_id, trial)
    return study_id


def same(first, second):
    """Whether trials are equal, their parameters in the same order; NaN equals itself.

    Optuna reads attributes in an order that each database chooses.
    """
    for trial in (*first, *second):
        trial.user_attrs = dict(sorted(trial.user_attrs.items()))
    return repr(first) == repr(second) and [list(t.params) for t in first] == [
        list(t.params) for t in second
    ]


@pytest.mark.parametrize("server", ["sqlite", "postgresql", "mysql"])
def test_trials_are_those_that_optuna_reads(server, tmp_path):
    url = nullcontext(f"sqlite:///{tmp_path}/s.db") if server == "sqlite" else database(server)
    with url as where:
        ours, theirs = Database(where), RDBStorage(where)
        study_id = fill(theirs)
        trials = ours.get_all_trials(study_id)
        assert len(trials) == 8 and same(trials, theirs.get_all_trials(study_id))
        assert isinstance(trials[0].datetime_start, datetime)
        cached = optuna.storages.get_storage(ours)
        assert same(cached.get_all_trials(study_id), trials)
        running = trials[4]._trial_id
        theirs.set_trial_user_attr(running, "seconds", 2.0)
        theirs.set_trial_state_values(running, TrialState.COMPLETE, [1.0, 2.0])
        assert same(cached.get_all_trials(study_id), theirs.get_all_trials(study_id))
        assert ours.get_all_trials(theirs.create_new_study([1], "empty")) == []
        with pytest.raises(KeyError):
            ours.get_all_trials(99)
        for storage in (ours, theirs):
            storage.remove_session()
            storage.engine.dispose()
