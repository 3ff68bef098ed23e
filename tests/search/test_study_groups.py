"""Trials measured together, and trials that are stopped."""

import optuna
import pytest
from studies import each, evaluate, scores_of, study

from heretic_kl.errors import MeasurementError, SelectionError
from heretic_kl.scoring import Stopped
from heretic_kl.search import (
    open_storage,
    pick,
)


def test_trials_measured_together_are_told_one_by_one(folder):
    with open_storage(None, folder, "s") as storage:
        sizes = []

        def counted(edits):
            sizes.append(len(edits))
            return evaluate(edits)

        ours = study(storage)
        records = list(ours.run(10, counted, candidates=4))
        assert [record.number for record in records] == list(range(10))
        assert sizes == [4, 4, 2]
        assert all(record.state == "complete" for record in records)


def test_where_measuring_together_fails_each_trial_is_measured_alone(folder):
    with open_storage(None, folder, "s") as storage:

        def fragile(edits):
            if len(edits) > 1:
                raise MeasurementError("NaN in one of them")
            if edits[0].direction_position is None:
                raise MeasurementError("NaN")
            return evaluate(edits)

        notes = []
        run = study(storage).run(6, fragile, candidates=3, notify=notes.append)
        states = {record.state for record in run}
        assert states <= {"complete", "failed"} and "complete" in states
    assert notes == ["3 candidates are measured one by one: NaN in one of them"] * 2


def test_an_interrupted_group_leaves_no_trial_running(folder):
    with open_storage(None, folder, "s") as storage:

        def interrupted(edits):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            list(study(storage).run(6, interrupted, candidates=3))
        records = study(storage).records
        assert [record.state for record in records] == ["interrupted"] * 3


STOPPED = Stopped(3, {"refusals": "at least 12/40 after 20 answers"}, (0.3, -float("inf")))


def mostly_stopped(edit):
    scores = scores_of(edit)
    return STOPPED if scores["kl"].value > 8 else scores


def test_stopped_trials_are_kept_as_such_and_never_on_the_front(folder):
    with open_storage(None, folder, "s") as storage:
        ours = study(storage, startup=4)
        records = list(ours.run(30, each(mostly_stopped)))
        assert ours.finished == 30
    stopped = [record for record in records if record.state == "stopped"]
    assert len(stopped) > 5
    assert all(r.stopped == STOPPED and not r.scores and not r.objectives for r in stopped)
    with open_storage(None, folder, "s") as storage:
        again = study(storage, startup=4)
        assert again.records == tuple(records)
        assert {record.state for record in again.front} == {"complete"}
        with pytest.raises(SelectionError, match="no finished trial"):
            pick(f"trial={stopped[0].number}", again.front, again.records)
        assert len(list(again.run(33, each(mostly_stopped)))) == 3


def test_where_all_but_one_are_stopped_the_sampler_goes_on(folder):
    calls = iter(range(100))
    with open_storage(None, folder, "s") as storage:
        opened = study(storage, startup=2)
        run = opened.run(25, each(lambda edit: STOPPED if next(calls) else scores_of(edit)))
        assert [record.state for record in run].count("stopped") == 24


def test_the_sampler_takes_stopped_trials_for_worse_than_all_finished_ones():
    """Of 40 trials 4 count as good: finished ones, however few there are beside stopped ones."""
    from optuna.samplers._tpe.sampler import _split_trials

    opened = optuna.create_study(directions=["minimize"] * 2)
    for number in range(40):
        trial = opened.ask()
        trial.suggest_float("x", 0, 1)
        if number < 6:
            opened.tell(trial, [100.0 + number, 100.0 + number])
        else:
            opened.tell(trial, state=optuna.trial.TrialState.PRUNED)
    good, bad = _split_trials(opened, opened.trials, 4)
    assert [trial.number for trial in good] == [0, 1, 2, 3]
    assert len(bad) == 36


def test_side_by_side_some_stop(folder):
    with open_storage(None, folder, "s") as storage:
        records = list(study(storage).run(12, each(mostly_stopped), candidates=4))
    assert {record.state for record in records} == {"complete", "stopped"}
