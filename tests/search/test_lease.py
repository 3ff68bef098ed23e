"""A trial whose owner is gone is ended and its edit measured; one that is alive is left alone."""

import json
import os
import platform
import threading
import time

import optuna
import pytest
from test_study import SPACE, evaluate, study

from heretic_kl.search import lease as lease_module
from heretic_kl.search import open_storage


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    url = None if request.param == "journal" else f"sqlite:///{tmp_path / 'x.db'}"
    with open_storage(url, tmp_path / "studies", "s") as opened:
        yield opened


def start_trial(storage, owner, age):
    """A trial of a known-good edit that an owner began and last renewed `age` seconds ago."""
    ours = study(storage)
    ours._study.enqueue_trial(SPACE.known_good()[0])
    trial = ours._study.ask()
    SPACE.suggest(trial)
    trial.set_user_attr("owner", owner)
    trial.set_user_attr("renewed", time.time() - age)
    return trial.number


HERE, ELSEWHERE = platform.node(), "another-host"


@pytest.mark.parametrize(
    ("owner", "age", "abandoned"),
    [
        (f"{HERE}:{os.getppid()}", 0, False),
        (f"{HERE}:{os.getppid()}", 10_000, True),  # another process has the number now
        (f"{HERE}:999999999", 0, True),
        (f"{ELSEWHERE}:1", 0, False),
        (f"{ELSEWHERE}:1", 10_000, True),
    ],
)
def test_only_trials_whose_owner_is_gone_are_ended(storage, owner, age, abandoned):
    number = start_trial(storage, owner, age)
    states = [(record.number, record.state) for record in study(storage).records]
    assert states == ([(number, "interrupted")] if abandoned else [])


def test_the_start_edit_of_an_owner_killed_on_another_host_is_measured(storage):
    start_trial(storage, f"{ELSEWHERE}:1", 10_000)
    records = list(study(storage).run(len(SPACE.known_good()), evaluate))
    complete = [json.dumps(r.parameters, sort_keys=True) for r in records if r.state == "complete"]
    assert {json.dumps(p, sort_keys=True) for p in SPACE.known_good()} == set(complete)


def test_a_lease_that_expires_during_the_search_frees_its_edit(storage):
    number = start_trial(storage, f"{ELSEWHERE}:1", 0)
    ours = study(storage)
    for record in ours.run(len(SPACE.known_good()), evaluate):
        if record.number == number + 2:
            (trial,) = ours._study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
            live = optuna.Trial(ours._study, trial._trial_id)
            live.set_user_attr("renewed", time.time() - 10_000)
    measured = [json.dumps(r.parameters, sort_keys=True) for r in ours.records if r.scores]
    assert json.dumps(SPACE.known_good()[0], sort_keys=True) in measured


def test_a_running_trial_is_renewed_while_it_is_measured(storage, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    ours = study(storage)

    def renewed():
        (trial,) = ours._study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        return trial.user_attrs["renewed"]

    def slow(edits):
        first, pause = renewed(), threading.Event()
        for _ in range(2000):
            if renewed() != first:
                return evaluate(edits)
            pause.wait(0.01)
        raise AssertionError("never renewed")

    (record,) = ours.run(1, slow)
    assert record.state == "complete"


def test_a_trial_that_another_process_ended_does_not_end_the_search(storage):
    ours = study(storage)

    def slept(edits):
        for trial in ours._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            optuna.Trial(ours._study, trial._trial_id).set_user_attr("error", "interrupted")
            ours._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return evaluate(edits)

    run = ours.run(3, slept)
    assert next(run).state == "interrupted"
    run.close()
    assert [record.state for record in ours.run(3, evaluate)] == ["complete"] * 3
