"""A database or a proxy that goes away in the middle of a run, and comes back or does not."""

import collections
import threading
import time

import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from servers import DATABASES, proxy_server
from sqlalchemy.exc import OperationalError
from studies import SPACE, evaluate, study
from test_workers import texts

from heretic_kl.errors import StorageLostError
from heretic_kl.search import open_storage
from heretic_kl.search.storage import lease, steady
from heretic_kl.search.storage.lease import Watch
from heretic_kl.search.storage.steady import SteadyStorage, is_lost

STARTS = len(SPACE.known_good())


@pytest.fixture(params=["postgresql", "mysql", "proxy", "proxy of postgresql"])
def server(request, tmp_path):
    if request.param == "proxy":
        with proxy_server(f"sqlite:///{tmp_path / 'x.db'}") as proxy:
            yield proxy
        return
    with DATABASES[request.param.removeprefix("proxy of ")]() as database:
        if request.param in DATABASES:
            yield database
            return
        with proxy_server(database.url) as proxy:
            proxy.start, proxy.stop = database.start, database.stop
            yield proxy


def test_a_run_goes_on_where_the_server_was_gone(server, tmp_path):
    """It goes while trials are measured; what they gave is stored when it is back, and once."""
    ran, notices = [], []

    def measure(edits):
        ran.append(1)
        if len(ran) in (3, 6):
            server.stop()
            threading.Timer(2.0, server.start).start()
        return evaluate(edits)

    with open_storage(server.url, tmp_path, "s", notices.append) as storage:
        yielded = list(study(storage).run(STARTS + 4, measure))
        assert storage.interruptions == 2
    with open_storage(server.url, tmp_path, "s") as storage:
        records = study(storage).records
    assert len(records) == len(yielded) == len(ran) == len(set(texts(records))) == STARTS + 4
    assert {record.state for record in records} == {"complete"}
    assert len(notices) == 2
    assert all(n.startswith("the storage cannot be reached (") and "\n" not in n for n in notices)


@pytest.mark.parametrize("server", ["postgresql", "mysql", "proxy"], indirect=True)
def test_a_server_that_stays_away_ends_the_run_in_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr(steady, "PATIENCE_SECONDS", 1.0)

    def measure(edits):
        server.stop()
        return evaluate(edits)

    with open_storage(server.url, tmp_path, "s") as storage:
        with pytest.raises(StorageLostError, match="finished trials are kept") as raised:
            list(study(storage).run(3, measure))
    assert raised.value.exit_code == 5 and "\n" not in str(raised.value)
    server.start()
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1.0)  # its owner, this process, is alive
    with open_storage(server.url, tmp_path, "s") as storage:
        again = study(storage)
        assert [r.state for r in again.run(STARTS, evaluate)].count("complete") == STARTS


class Flaky(InMemoryStorage):
    """Loses its connection in calls of one kind: before they are done, or after."""

    def __init__(self, name, after, times=1):
        super().__init__()
        self.name, self.after, self.times = name, after, times
        self.calls = collections.Counter()

    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        if name.startswith("_") or name != super().__getattribute__("name"):
            return method

        def call(*arguments, **named):
            self.calls[name] += 1
            if self.calls[name] > self.times:
                return method(*arguments, **named)
            if self.after:
                method(*arguments, **named)
            raise OperationalError("x", {}, Exception("the server closed the connection"))

        return call


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(steady, "PAUSE_SECONDS", 0.01)


@pytest.mark.parametrize("after", [False, True])
def test_a_call_whose_answer_was_lost_is_not_done_twice(impatient, after):
    for name in ("create_new_trial", "set_trial_state_values", "set_trial_user_attr"):
        inner = Flaky(name, after)
        storage = SteadyStorage(inner)
        opened = optuna.create_study(storage=storage, study_name="s")
        template = optuna.create_trial(state=TrialState.RUNNING, params={}, distributions={})
        trial = storage.create_new_trial(opened._study_id, template)
        storage.set_trial_user_attr(trial, "a", 1)
        assert storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.5])
        (stored,) = storage.get_all_trials(opened._study_id)
        assert (stored.state, stored.values, stored.user_attrs) == (
            TrialState.COMPLETE,
            [0.5],
            {"a": 1},
        )
        assert inner.calls[name] >= 1


@pytest.mark.parametrize("after", [False, True])
def test_a_queued_trial_is_not_taken_twice(impatient, after):
    storage = SteadyStorage(Flaky("set_trial_state_values", after))
    opened = optuna.create_study(storage=storage, study_name="s")
    template = optuna.create_trial(state=TrialState.WAITING, params={}, distributions={})
    trial = storage.create_new_trial(opened._study_id, template)
    assert storage.set_trial_state_values(trial, TrialState.RUNNING) is not after


def test_whoever_is_asked_to_stop_does_not_wait(impatient):
    storage = SteadyStorage(Flaky("get_all_studies", False, times=10**6))
    with pytest.raises(StorageLostError, match=r"reached \(the server closed the connection\)"):
        try:
            raise KeyboardInterrupt
        finally:
            storage.get_all_studies()


@pytest.mark.parametrize("candidates", [1, 3])
def test_a_loss_while_edits_are_measured_fails_no_trial(candidates):
    """The storage is back when the trials are over; they are handed back, not failed."""

    def measure(edits):
        raise StorageLostError("the storage cannot be reached")

    storage = InMemoryStorage()
    with pytest.raises(StorageLostError):
        list(study(storage).run(3, measure, candidates=candidates))
    assert {r.state for r in study(storage).records} == {"interrupted"}
    again = study(storage)
    list(again.run(3, evaluate))
    assert [r.state for r in again.records].count("complete") == 3


def test_errors_that_are_no_loss_are_raised_at_once():
    assert not is_lost(ValueError("x")) and not is_lost(KeyError())
    with pytest.raises(KeyError):
        SteadyStorage(InMemoryStorage()).get_study_id_from_name("none")


def test_time_without_a_storage_is_not_held_against_an_owner(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("heretic_kl.search.storage.lease.time.monotonic", lambda: now[0])
    storage = SteadyStorage(InMemoryStorage())
    attributes = {lease.LEASE: {"owner": "elsewhere:1", "renewed": time.time()}}
    trial = optuna.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
    watch = Watch(storage)
    assert not watch.abandoned(trial)
    now[0] = 151.0
    storage.interruptions += 1
    assert not watch.abandoned(trial)
    now[0] = 303.0
    assert watch.abandoned(trial)
