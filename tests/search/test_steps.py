"""A trial begins and ends in one call and one transaction, and is stored as Optuna stores it."""

import collections
import itertools
import threading
import time

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from servers import database, free_port
from sqlalchemy import event
from sqlalchemy.exc import OperationalError
from studies import SPACE, evaluate, study
from test_database import same

from heretic_kl.search import open_storage
from heretic_kl.search.storage import lease_attributes, steady, steps
from heretic_kl.search.storage.backends import _database, _steady
from heretic_kl.search.storage.proxy import run_proxy
from heretic_kl.search.storage.steady import SteadyStorage
from heretic_kl.search.trials import next_pause

STARTS = len(SPACE.known_good())
DIRECTIONS = [optuna.study.StudyDirection.MINIMIZE] * 2


class Counted:
    """A storage that counts what it is asked: behind a proxy, the calls of its clients."""

    def __init__(self, storage):
        self._storage, self.calls = storage, collections.Counter()

    def __getattr__(self, name):
        method = getattr(self._storage, name)

        def call(*arguments, **named):
            self.calls[name] += 1
            return method(*arguments, **named)

        return call


class Losing(Counted):
    """Loses its connection in the first call of each step: before it is done, or after."""

    after = False

    def __getattr__(self, name):
        method = super().__getattr__(name)

        def call(*arguments, **named):
            first = name in ("begin_trial", "end_trial") and not self.calls[name]
            if not first or self.after:
                answer = method(*arguments, **named)
            if first:
                self.calls[name] = 1
                raise OperationalError("x", {}, Exception("the server closed the connection"))
            return answer

        return call


@pytest.fixture
def served(tmp_path):
    """The URL of a proxy, the counter behind it, and the engine of its database."""
    backend = _database(f"sqlite:///{tmp_path / 'x.db'}")
    counted, port, ready = Counted(_steady(backend)), free_port(), threading.Event()
    threading.Thread(
        target=run_proxy, args=(counted, "127.0.0.1", port, ready.set), daemon=True
    ).start()
    assert ready.wait(30)
    return f"grpc://127.0.0.1:{port}", counted, backend.engine


def drawn(index=0, state=TrialState.RUNNING):
    parameters = {**SPACE.known_good()[0], "direction.position": 0.3 + 0.001 * index}
    distributions = SPACE.distributions
    attributes = lease_attributes() if state == TrialState.RUNNING else {}
    return optuna.create_trial(
        state=state, params=parameters, distributions=distributions, user_attrs=attributes
    )


def outcome_of(trial, state=TrialState.COMPLETE, values=(0.5, float("inf"))):
    ended = optuna.create_trial(
        state=TrialState.FAIL, user_attrs={"scores": "{}", "x": [1]}, constraints={"kl": -0.5}
    )
    ended._trial_id, ended.state, ended.values = trial._trial_id, state, values
    return ended


def test_an_ask_takes_two_calls_and_a_tell_one(served, tmp_path):
    """However many trials run, and in few statements."""
    url, counted, engine = served
    statements, taken = [], collections.defaultdict(list)
    event.listen(engine, "before_cursor_execute", lambda *a: statements.append(a[2]))

    def take(what):
        taken[what].append((dict(counted.calls), len(statements)))
        counted.calls.clear()
        statements.clear()

    def measure(edits):
        take("ask")
        return evaluate(edits)

    with open_storage(url, tmp_path, "s") as storage:
        opened = study(storage, startup=10**6)
        list(opened.run(STARTS, evaluate))
        for running in (0, 40):
            held = [opened._trials.begin(opened._trials.read(), 0) for _ in range(running)]
            take("between")
            for _ in itertools.islice(opened.run(10**6, measure), 5):
                take("tell")
            for trial in held:
                opened._trials._heartbeat.remove(trial.id)
    calls, counts = zip(*taken["ask"][1:5], *taken["ask"][6:], strict=True)  # not the first ones
    assert all(one == {"get_all_trials": 1, "begin_trial": 1} for one in calls), calls
    assert max(counts) <= 18 and max(counts) - min(counts) <= 1, counts
    calls, counts = zip(*taken["tell"], strict=True)
    assert all(one == {"end_trial": 1} for one in calls), calls
    assert max(counts) <= 9, counts


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mysql"])
def test_what_is_stored_is_what_optuna_stores(kind, tmp_path):
    def compare(url):
        theirs, storage = RDBStorage(url), _steady(_database(url))
        study_id = storage.create_new_study(DIRECTIONS, "s")
        pairs = []
        for index, state in enumerate((TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE)):
            values = (0.5, float("inf")) if state == TrialState.COMPLETE else None
            (ours,) = steps.begin_trial(storage, study_id, drawn(index), 2 * index)
            assert ours.number == 2 * index and ours.params == drawn(index).params
            other = theirs.create_new_trial(study_id, drawn(index))
            theirs.set_trial_user_attr(ours._trial_id, "x", "before")
            steps.end_trial(storage, study_id, outcome_of(ours, state, values), {"note": index})
            ended = outcome_of(ours, state, values)
            ended._trial_id = other
            steps.end_by_calls(theirs, study_id, ended, {"other": index})
            pairs.append((theirs.get_trial(ours._trial_id), theirs.get_trial(other)))
        for ours, other in pairs:
            assert ours.datetime_start and ours.datetime_complete and ours.number < other.number
            ours.system_attrs.pop(steps.CALL, None)
            assert ours.user_attrs.pop("lease") and other.user_attrs.pop("lease")
            for name in ("datetime_start", "datetime_complete", "number", "_trial_id"):
                setattr(other, name, getattr(ours, name))
            ours.system_attrs = dict(sorted(ours.system_attrs.items()))
            other.system_attrs = dict(sorted(other.system_attrs.items()))
            assert same([ours], [other])
        assert theirs.get_study_system_attrs(study_id) == {"note": 2, "other": 2}
        assert same(storage.get_all_trials(study_id), theirs.get_all_trials(study_id))
        for backend in (theirs, getattr(storage, "_storage", storage)._backend):
            backend.remove_session()
            backend.engine.dispose()

    if kind == "sqlite":
        compare(f"sqlite:///{tmp_path}/s.db")
    else:
        with database(kind) as url:
            compare(url)


@pytest.fixture(params=["journal", "sqlite", "proxy", "proxy of Optuna's"])
def shared(request, served, tmp_path, monkeypatch):
    """A storage, opened twice."""
    url = {"journal": None, "sqlite": f"sqlite:///{tmp_path / 'y.db'}"}.get(request.param, "")
    if request.param == "proxy of Optuna's":
        from heretic_kl.search.storage import proxy_calls

        monkeypatch.setattr(proxy_calls, "SERVICE", "heretic_kl.Unknown")
    url = served[0] if url == "" else url
    with open_storage(url, tmp_path, "s") as first, open_storage(url, tmp_path, "s") as second:
        yield first, second


def test_what_was_begun_since_comes_with_a_new_trial(shared):
    first, second = shared
    study_id = first.create_new_study(DIRECTIONS, "s")
    for index in range(3):
        steps.begin_trial(first, study_id, drawn(index), index)
    begun = steps.begin_trial(second, study_id, drawn(3), 1)
    assert [trial.number for trial in begun] == [1, 2, 3]
    assert [trial.params for trial in begun] == [drawn(index).params for index in (1, 2, 3)]
    assert begun[-1]._trial_id == second.get_all_trials(study_id)[3]._trial_id


def test_what_changes_of_a_running_trial_is_seen(shared):
    """Its lease while it runs, and all of it at its end; also that of a queued trial."""
    first, second = shared
    study_id = first.create_new_study(DIRECTIONS, "s")
    queued = first.create_new_trial(study_id, drawn(0, TrialState.WAITING))
    (begun,) = steps.begin_trial(first, study_id, drawn(1), 1)
    for _ in range(2):
        assert [t.state.name for t in second.get_all_trials(study_id)] == ["WAITING", "RUNNING"]
    assert first.set_trial_state_values(queued, TrialState.RUNNING)
    for trial_id in (queued, begun._trial_id):
        first.set_trial_user_attr(trial_id, "lease", {"owner": "x:1", "renewed": 5.0})
    trials = second.get_all_trials(study_id)
    for index, trial in enumerate(trials):
        assert trial.state == TrialState.RUNNING and trial.datetime_start
        assert trial.user_attrs["lease"]["renewed"] == 5.0
        assert (trial.params, trial.distributions) == (drawn(index).params, SPACE.distributions)
    steps.end_trial(first, study_id, outcome_of(begun), {})
    ended = second.get_all_trials(study_id)[1]
    assert (ended.state.name, list(ended.values)) == ("COMPLETE", [0.5, float("inf")])
    assert ended.params == drawn(1).params and ended.constraints == {"kl": -0.5}
    assert {"lease", "scores", "x"} == set(ended.user_attrs)


def test_of_a_trial_that_is_over_nothing_is_changed(shared):
    first, second = shared
    study_id = first.create_new_study(DIRECTIONS, "s")
    (begun,) = steps.begin_trial(first, study_id, drawn(), 0)
    second.set_trial_state_values(begun._trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        steps.end_trial(first, study_id, outcome_of(begun), {"note": 1})
    (stored,) = second.get_all_trials(study_id)
    assert stored.state == TrialState.FAIL and set(stored.user_attrs) == {"lease"}
    assert second.get_study_system_attrs(study_id) == {}


def test_a_step_that_fails_in_the_middle_leaves_nothing(tmp_path):
    """What the last statement of an end raises takes the first ones back."""
    backend = _database(f"sqlite:///{tmp_path / 'x.db'}")
    storage = _steady(backend)
    study_id = storage.create_new_study(DIRECTIONS, "s")
    (begun,) = steps.begin_trial(storage, study_id, drawn(), 0)

    def fail(connection, cursor, statement, *rest):
        if "INSERT INTO study_system_attributes" in statement:
            raise ValueError("in the middle")

    event.listen(backend.engine, "before_cursor_execute", fail)
    with pytest.raises(ValueError, match="in the middle"):
        steps.end_trial(storage, study_id, outcome_of(begun), {"note": 1})
    (stored,) = storage.get_all_trials(study_id)
    assert stored.state == TrialState.RUNNING and set(stored.user_attrs) == {"lease"}


@pytest.mark.parametrize("after", [False, True])
def test_a_step_whose_answer_was_lost_is_not_done_twice(after, tmp_path, monkeypatch):
    monkeypatch.setattr(steady, "PAUSE_SECONDS", 0.01)
    inner = Losing(_steady(_database(f"sqlite:///{tmp_path / 'x.db'}")))
    inner.after, storage = after, SteadyStorage(inner)
    study_id = storage.create_new_study(DIRECTIONS, "s")
    steps.begin_by_calls(storage, study_id, drawn(0), 0)
    _, begun = steps.begin_trial(storage, study_id, drawn(1), 0)
    assert begun.number == 1 and begun.params == drawn(1).params
    steps.end_trial(storage, study_id, outcome_of(begun), {"note": 1})
    _, stored = storage.get_all_trials(study_id)
    assert (stored.state, stored.values) == (TrialState.COMPLETE, [0.5, float("inf")])
    assert {"lease", "scores", "x"} == set(stored.user_attrs)
    assert storage.get_study_system_attrs(study_id) == {"note": 1} and storage.interruptions == 2


def test_those_who_read_at_once_share_a_read(tmp_path, monkeypatch):
    backend = _database(f"sqlite:///{tmp_path / 'x.db'}")
    storage, reads, read = _steady(backend), [], backend._get_trials
    study_id = storage.create_new_study(DIRECTIONS, "s")
    steps.begin_trial(storage, study_id, drawn(), 0)

    def slowly(*arguments, **named):
        reads.append(1)
        time.sleep(0.3)
        return read(*arguments, **named)

    monkeypatch.setattr(backend, "_get_trials", slowly)
    seen = []
    readers = [
        threading.Thread(target=lambda: seen.append(storage.get_all_trials(study_id)))
        for _ in range(12)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(seen) == 12 and all(len(trials) == 1 for trials in seen)
    assert len(reads) < 12
    before = len(reads)
    storage.get_all_trials(study_id)  # whoever asks later reads anew
    assert len(reads) == before + 1


def test_workers_that_wait_for_many_others_look_seldom():
    looks = collections.Counter()
    for running in (1, 200):
        pause, waited = 0.0, 0.0
        while waited < 60:
            pause = next_pause(pause, running)
            waited += pause
            looks[running] += 1
    assert looks[200] <= 10 < looks[1] <= 45
    assert next_pause(0.0, 1) == 0.2 and next_pause(10.0, 1) == 2.0
