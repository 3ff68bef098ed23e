"""Several workers run one study: nothing is lost, nothing is measured twice."""

import json
import multiprocessing
import os
import random
import sys
import threading
import time

import pytest
from studies import SPACE, evaluate, study

from heretic_kl.search import open_storage
from heretic_kl.search.sampler import Drawer
from heretic_kl.search.storage import Heartbeat, Roles, Watch

STARTS = len(SPACE.known_good())


@pytest.fixture
def place(request, tmp_path):
    """What `open_storage` is given; each worker opens it for itself."""
    url = f"sqlite:///{tmp_path / 'x.db'}" if getattr(request, "param", "") == "sqlite" else None
    with open_storage(url, tmp_path, "s") as storage:
        study(storage)
    return url, tmp_path, "s"


def in_threads(count, work):
    errors = []

    def guarded(number):
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def texts(records):
    return [json.dumps(record.parameters, sort_keys=True) for record in records]


@pytest.mark.parametrize("place", ["journal", "sqlite"], indirect=True)
def test_workers_share_the_trials_of_a_study(place):
    ran, seen = [0, 0, 0], [[], [], []]

    def work(number):
        def counted(edits):
            ran[number] += 1
            return evaluate(edits)

        with open_storage(*place) as storage:
            for record in study(storage).run(STARTS + 4, counted):
                seen[number].append(record.number)

    in_threads(3, work)
    with open_storage(*place) as storage:
        records = study(storage).records
    complete = [record for record in records if record.state == "complete"]
    assert len(complete) == STARTS + 4 == sum(ran)
    assert {record.number for record in complete} == {n for numbers in seen for n in numbers}
    assert all(len(set(numbers)) == len(numbers) for numbers in seen)
    assert len(set(texts(complete))) == len(complete)
    assert {json.dumps(p, sort_keys=True) for p in SPACE.known_good()} <= set(texts(complete))


def test_a_worker_waits_for_the_last_trial_of_another(place):
    """And goes on where the other one gives it back."""
    begun, go_on = threading.Event(), threading.Event()

    def stopping(edits):
        begun.set()
        go_on.wait()
        raise KeyboardInterrupt

    def work(number):
        with open_storage(*place) as storage:
            if number == 0:
                with pytest.raises(KeyboardInterrupt):
                    list(study(storage).run(1, stopping))
                return
            begun.wait()
            opened = study(storage)
            waits = opened.run(1, evaluate, stop=lambda: go_on.set() is not None)
            assert [record.state for record in waits] == ["complete"]

    in_threads(2, work)
    with open_storage(*place) as storage:
        first, second = study(storage).records
    assert (first.state, second.state) == ("interrupted", "complete")


def test_an_interrupted_draw_is_measured_with_the_same_parameters(place):
    def interrupted(edits):
        raise KeyboardInterrupt

    with open_storage(*place) as storage:
        opened = study(storage)
        list(opened.run(STARTS + 1, evaluate))
        with pytest.raises(KeyboardInterrupt):
            list(opened.run(STARTS + 2, interrupted))
        (again,) = opened.run(STARTS + 2, evaluate)
        assert opened.records[-2].state == "interrupted"
        assert opened.records[-2].parameters == again.parameters


def test_an_interrupted_study_ends_with_the_trials_of_an_undisturbed_one(tmp_path):
    """Interrupted at a start, which is measured last then, and at two draws."""

    def interrupted(edits):
        raise KeyboardInterrupt

    def parameters(name, stops):
        with open_storage(None, tmp_path / name, "s") as storage:
            opened = study(storage)
            for stop in (*stops, STARTS + 6):
                list(opened.run(stop, evaluate))
                if stop in stops:
                    with pytest.raises(KeyboardInterrupt):
                        list(opened.run(stop + 1, interrupted))
            return set(texts(r for r in opened.records if r.state == "complete"))

    before = parameters("undisturbed", ())
    assert len(before) == STARTS + 6
    assert parameters("disturbed", (3, STARTS + 1, STARTS + 4)) == before


def test_workers_that_draw_the_same_at_once_measure_it_once(place, monkeypatch):
    """Neither can see the other's trial while it draws."""
    drawing, draw = threading.Barrier(2), Drawer.draw
    first = draw(Drawer(1, 0, 2), [], SPACE.distributions, 0)
    seen = []

    def same_at_first(self, trials, distributions, worker):
        if len(trials) > STARTS:
            return draw(self, trials, distributions, worker)
        seen.append(worker)
        drawing.wait(timeout=60)
        return first

    def work(number):
        with open_storage(*place) as storage:
            list(study(storage).run(STARTS + 2, evaluate))

    with open_storage(*place) as storage:
        list(study(storage).run(STARTS, evaluate))
    monkeypatch.setattr(Drawer, "draw", same_at_first)
    in_threads(2, work)
    with open_storage(*place) as storage:
        complete = [r for r in study(storage).records if r.state == "complete"]
    assert len(set(seen)) == 2
    assert len(complete) == len(set(texts(complete))) == STARTS + 2


@pytest.mark.parametrize("place", ["journal", "sqlite"], indirect=True)
def test_all_trials_are_read_once_a_trial(place, monkeypatch):
    """Many workers on one server have nothing else to wait for."""
    with open_storage(*place) as storage:
        search = study(storage)
        list(search.run(STARTS, evaluate))
        reads, read = [], storage.get_all_trials
        monkeypatch.setattr(
            storage, "get_all_trials", lambda *a, **k: reads.append(a[0]) or read(*a, **k)
        )
        list(search.run(STARTS + 6, evaluate))
    of_trials = reads.count(search._trials._study_id)
    assert of_trials <= 6 + 2  # one before the first, one that finds nothing missing


@pytest.mark.parametrize("place", ["journal", "sqlite"], indirect=True)
def test_one_process_at_a_time_has_a_role(place):
    inside, most, numbers = [0], [0], []

    def work(number):
        with open_storage(*place) as storage:
            roles = Roles(storage, "s", Heartbeat(storage), Watch())
            for _ in range(3):
                with roles.hold("refine"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    time.sleep(0.005)
                    inside[0] -= 1
            with roles.hold_numbered("worker") as mine:
                numbers.append(mine)
                barrier.wait()

    barrier = threading.Barrier(3)
    in_threads(3, work)
    assert most == [1]
    assert sorted(numbers) == [0, 1, 2]


def worker(place, finished, until):
    """The life of a worker in a process of its own, which writes down what it saw finish."""
    said = os.open(finished, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with open_storage(*place) as storage:
        for record in study(storage).run(until, slowly):
            os.write(said, f"{record.number}\n".encode())


def slowly(edits):
    time.sleep(0.01)
    return evaluate(edits)


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX")
def test_killed_workers_lose_no_finished_trial_and_repeat_none(tmp_path):
    place, until, chance = (None, tmp_path, "s"), 40, random.Random(5)
    # Forked from a process without threads: a child of this one could wait for some of torch's.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    work, children = (place, tmp_path / "finished", until), []
    for _ in range(10):
        while len(children) < 3:
            children.append(processes.Process(target=worker, args=work))
            children[-1].start()
        time.sleep(chance.uniform(0.02, 0.6))
        victim = children.pop(chance.randrange(3))
        victim.kill()
        victim.join()
    with open_storage(*place) as storage:
        opened = study(storage)
        list(opened.run(until, evaluate))
        complete = [record for record in opened.records if record.state == "complete"]
    for child in children:
        child.join()
    reported = [int(line) for line in (tmp_path / "finished").read_text().split()]
    assert len(complete) == until
    assert set(reported) <= {record.number for record in complete}
    assert len(set(texts(complete))) == until
