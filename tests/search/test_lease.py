"""A trial whose owner is gone is ended and its edit measured; one that is alive is left alone."""

import json
import os
import subprocess
import sys
import threading
import time

import optuna
import pytest
from studies import SPACE, evaluate, study

from heretic_kl.search import open_storage
from heretic_kl.search.storage import lease as lease_module


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    url = None if request.param == "journal" else f"sqlite:///{tmp_path / 'x.db'}"
    with open_storage(url, tmp_path / "studies", "s") as opened:
        yield opened


def lease(owner, age=0.0):
    return {"owner": owner, "renewed": time.time() - age}


def start_trial(storage, owner, age):
    """A trial of a known-good edit that an owner began and last renewed `age` seconds ago."""
    template = optuna.create_trial(
        state=optuna.trial.TrialState.RUNNING,
        params=SPACE.known_good()[0],
        distributions=SPACE.distributions,
        user_attrs={"lease": lease(owner, age)},
    )
    opened = study(storage)._study
    return storage.get_trial(storage.create_new_trial(opened._study_id, template)).number


HERE, ELSEWHERE = lease_module._host(), "another-host"
PARENT = lease_module._process(os.getppid())


@pytest.mark.parametrize(
    ("owner", "age", "abandoned"),
    [
        (f"{HERE}:{PARENT}", 0, False),
        (f"{HERE}:{PARENT}", 10_000, False),  # our clock may have jumped
        (f"{HERE}:{PARENT}1", 0, True),  # another process has the number now
        (f"{HERE}:999999999.1", 0, True),
        (f"{ELSEWHERE}:1", 0, False),
        (f"{ELSEWHERE}:1", 10_000, True),
    ],
    ids=[
        "lives",
        "lives, by another clock",
        "number given again",
        "died",
        "elsewhere",
        "elsewhere, silent",
    ],
)
def test_only_trials_whose_owner_is_gone_are_ended(storage, owner, age, abandoned):
    number = start_trial(storage, owner, age)
    states = [(record.number, record.state) for record in study(storage).records]
    assert states == ([(number, "interrupted")] if abandoned else [])


def test_a_lease_that_stands_still_is_over_whatever_the_clocks_say(storage, monkeypatch):
    number = start_trial(storage, f"{ELSEWHERE}:1", -300)  # its clock is five minutes ahead
    watch = lease_module.Watch()
    trial = study(storage)._trials.read()[number]
    assert not watch.abandoned(trial) and not watch.abandoned(trial)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + lease_module.EXPIRY_SECONDS + 1)
    trial.user_attrs["lease"]["renewed"] += 20
    assert not watch.abandoned(trial)
    monkeypatch.setattr(time, "monotonic", lambda: now + 2 * lease_module.EXPIRY_SECONDS + 2)
    assert watch.abandoned(trial)


def test_a_killed_child_is_gone_before_its_parent_has_looked():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = lease_module._process(child.pid)
    assert lease_module._runs(process)
    child.kill()
    while lease_module._runs(process):
        pass  # a zombie until it is waited for
    child.communicate()
    assert not lease_module._runs(process)


def test_an_edit_over_which_processes_keep_dying_fails(storage):
    for _ in range(5):
        start_trial(storage, f"{HERE}:999999999.1", 0)
    records = study(storage).records
    assert [record.state for record in records] == ["interrupted"] * 4 + ["failed"]
    assert records[-1].error == "the process died, 5 times in all"
    list(study(storage).run(len(SPACE.known_good()), evaluate))
    parameters = [record.parameters for record in study(storage).records]
    assert parameters.count(SPACE.known_good()[0]) == 5


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
            gone = lease(f"{ELSEWHERE}:1", 10_000)
            storage.set_trial_user_attr(trial._trial_id, "lease", gone)
    measured = [json.dumps(r.parameters, sort_keys=True) for r in ours.records if r.scores]
    assert json.dumps(SPACE.known_good()[0], sort_keys=True) in measured


def test_a_running_trial_is_renewed_while_it_is_measured(storage, monkeypatch):
    monkeypatch.setattr(lease_module, "RENEW_SECONDS", 0.01)
    ours = study(storage)

    def renewed():
        (trial,) = ours._study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        return trial.user_attrs["lease"]["renewed"]

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
