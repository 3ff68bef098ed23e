"""A raced search stops losers and ends with the same front."""

import pytest
from sessions import run

from heretic_kl import events


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_raced_search_stops_losers_and_finds_the_same_front(workplace, tmp_path, at_once):
    changes = {"trials": 30, "startup_trials": 30, "parallel_candidates": at_once}
    changes["refine"] = False
    changes["scorers"] = {
        "refusals": {"settings": {"markers": ["flour", "mix"]}},
        "teacher_forced_kl": {"settings": {"set_aside_refused": False, "kl_target": 0.0}},
    }
    whole, _ = run(workplace, tmp_path / "whole", **changes)
    with whole:
        whole.search()
        expected = {record.number: record for record in whole.trials}
        front = [record.number for record in whole.front]
    raced, seen = run(workplace, tmp_path / "raced", racing=True, **changes)
    with raced:
        raced.search()
        stopped = [record for record in raced.trials if record.state == "stopped"]
        assert stopped and raced.parts.study.finished == 30
        assert not {record.number for record in stopped} & set(front)
        for record in stopped:
            assert expected[record.number].parameters == record.parameters
            assert record.stopped.dominated_by < record.number
        if at_once == 1:  # side by side, rounding differs with who is still there
            finished = [record for record in raced.trials if record.state == "complete"]
            for record in finished:
                assert record.scores == expected[record.number].scores
            assert [record.number for record in raced.front] == front
        raced.test()
    again, _ = run(workplace, tmp_path / "raced", **changes)
    with again:
        assert [r.stopped for r in again.trials if r.stopped] == [r.stopped for r in stopped]
    finished = [event for event in seen if isinstance(event, events.TrialFinished)]
    assert len(finished) == 30 and finished[-1].finished == 30
