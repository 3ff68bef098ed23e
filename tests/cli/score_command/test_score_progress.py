"""How far `heretic-kl score` is: prompts done of all, which candidate of how many, time left."""

import json

import pytest
from score_runs import score

from heretic_kl.cli.score.progress import MeasuringStages
from heretic_kl.events import StageAdvanced, StageFinished, StageStarted
from heretic_kl.score import TeacherForcedKL


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_the_time_left_is_that_of_this_candidate_and_the_later_ones(clock):
    events = []
    stages = MeasuringStages(events.append, "prompts")
    with stages.stage("Measuring b, candidate 1 of 3", later=2):
        clock[0] += 4.0  # to load it
        for done in range(5):
            stages("candidate", done, 4)
            clock[0] += 1.0
    advanced = [event for event in events if isinstance(event, StageAdvanced)]
    assert [(event.done, event.steps) for event in advanced] == [(n, 4) for n in range(5)]
    assert {event.note for event in advanced} == {"prompts"}
    # 4 s to load and 1 s a prompt make 8 s a candidate.
    assert [event.seconds_left for event in advanced] == [None, 19.0, 18.0, 17.0, 16.0]
    assert isinstance(events[0], StageStarted) and events[-1] == StageFinished("measure", 9.0)


def test_parts_of_a_stage_begin_anew_and_few_events_are_sent(clock):
    events = []
    stages = MeasuringStages(events.append, "windows")
    with stages.stage("Measuring the reference a"):
        for part in ("responses", "reference", "rounded to 8 bits"):
            for done in range(1001):
                stages(part, done, 1000)
                clock[0] += 0.001
    advanced = [event for event in events if isinstance(event, StageAdvanced)]
    assert len(advanced) < 30
    notes = list(dict.fromkeys(event.note for event in advanced))
    assert notes == ["responses", "windows", "windows, rounded to 8 bits"]
    ends = [event for event in advanced if event.done == 1000]
    assert [event.seconds_left for event in ends] == [0.0, 0.0, 0.0]


def test_json_lines_tell_it(capsys, monkeypatch):
    monkeypatch.setattr("heretic_kl.cli.score.progress.SHORTEST", 0.0)
    assert score("--bands", "--json", candidates=["b", "a"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    titles = [line["title"] for line in lines if line["event"] == "stage_started"]
    assert titles[-2:] == ["Measuring b, candidate 1 of 2", "Measuring a, candidate 2 of 2"]
    advanced = [line for line in lines if line["event"] == "stage_advanced"]
    by_note = {}
    for line in advanced:
        by_note.setdefault(line["note"], []).append(line)
    assert {"responses", "prompts", "prompts, rounded to 3 bits"} <= by_note.keys()
    for same in by_note.values():
        assert same[0]["done"] == 0 and same[-1]["done"] == same[-1]["steps"]
    assert by_note["prompts"][-1]["steps"] == 6
    assert by_note["prompts"][-1]["seconds_left"] == 0.0
    first = next(n for n, line in enumerate(lines) if line.get("title") == titles[-2])
    middle = [line for line in lines[first:] if line["event"] == "stage_advanced"]
    assert any((line["seconds_left"] or 0.0) > 0.0 for line in middle)


def test_the_library_tells_it_too(here):
    seen = []
    kl = TeacherForcedKL(
        here / "a",
        prompts=["make a cake", "wait please", "sorry"],
        batch_size=1,
        progress=lambda *progress: seen.append(progress),
    )
    assert [n for part, n, total in seen if part == "responses"] == [0, 1, 2, 3]
    seen.clear()
    kl.score(here / "b")
    assert {(part, total) for part, _, total in seen} == {("candidate", 3)}
    assert seen[0][1] == 0 and seen[-1][1] == 3
