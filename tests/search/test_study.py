"""The study is resumable at any point and never draws the same parameters twice."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import optuna
import pytest
from studies import OBJECTIVES, SPACE, each, evaluate, parameters, scores_of, study

from heretic_kl.errors import MeasurementError, StudyError
from heretic_kl.scoring import Score, ScorerSpec
from heretic_kl.search import (
    check_storage,
    open_storage,
    stored_batch_size,
    without_password,
)
from heretic_kl.search.sampler import trial_seed


def test_runs_known_good_edits_first_and_then_no_two_alike(folder):
    with open_storage(None, folder, "s") as storage:
        records = list(study(storage).run(14, evaluate))
    starts = [json.dumps(p, sort_keys=True) for p in SPACE.known_good()]
    assert parameters(records)[: len(starts)] == starts
    assert len(set(parameters(records))) == 14
    assert [record.number for record in records] == list(range(14))


@pytest.mark.parametrize("stop", [3, 7, 11])
def test_interrupted_and_resumed_equals_uninterrupted(folder, stop):
    with open_storage(None, folder / "whole", "s") as storage:
        whole = list(study(storage).run(14, evaluate))
    with open_storage(None, folder / "parts", "s") as storage:
        list(study(storage).run(stop, evaluate))
    with open_storage(None, folder / "parts", "s") as storage:
        resumed = study(storage)
        assert resumed.finished == stop
        list(resumed.run(14, evaluate))
        assert parameters(resumed.records) == parameters(whole)


def test_another_seed_draws_other_parameters(folder):
    drawn = []
    for seed in (1, 2):
        with open_storage(None, folder / str(seed), "s") as storage:
            records = study(storage, seed=seed).run(len(SPACE.known_good()) + 3, evaluate)
            drawn.append(parameters(records)[-3:])
    assert not set(drawn[0]) & set(drawn[1])
    assert len({trial_seed(0, number) for number in range(1000)}) == 1000


def test_ctrl_c_keeps_finished_trials_and_marks_the_running_one(folder):
    calls = iter(range(100))

    def interrupted(edit):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return scores_of(edit)

    with open_storage(None, folder, "s") as storage:
        with pytest.raises(KeyboardInterrupt):
            list(study(storage).run(10, each(interrupted)))
    with open_storage(None, folder, "s") as storage:
        resumed = study(storage)
        assert resumed.finished == 4
        assert resumed.records[4].state == "interrupted"
        list(resumed.run(10, evaluate))
        assert resumed.finished == 10
        assert len(resumed.records) == 11
        complete = [r for r in resumed.records if r.state == "complete"]
        assert len(set(parameters(complete))) == len(complete) == 10


KILLED = """
    import os, signal, sys, time
    sys.path.insert(0, {tests!r})
    from studies import each, scores_of, study
    from heretic_kl.search import open_storage
    from pathlib import Path
    done = 0
    def slow(edit):
        global done
        done += 1
        if done == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return scores_of(edit)
    with open_storage(None, Path({folder!r}), "s") as storage:
        list(study(storage).run(20, each(slow)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX")
def test_kill_9_in_the_middle_of_a_trial(folder):
    code = textwrap.dedent(KILLED).format(tests=os.path.dirname(__file__), folder=str(folder))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    # What a process killed in the middle of a write leaves behind.
    with (folder / "s.journal").open("ab") as file:
        file.write(b'{"op_code": 8, "trial_id": 5, "user_a')
    (folder / "s.journal.lock").touch()
    with open_storage(None, folder, "s") as storage:
        resumed = study(storage)
        assert resumed.finished == 5
        assert resumed.records[5].state == "interrupted"
        list(resumed.run(12, evaluate))
        assert len(resumed.records) == 13
        complete = [r for r in resumed.records if r.state == "complete"]
        assert len(set(parameters(complete))) == len(complete) == 12


def test_failed_trials_are_recorded_and_the_search_goes_on(folder):
    calls = iter(range(100))

    def sometimes(edit):
        if next(calls) % 3 == 1:
            raise MeasurementError("NaN logits")
        return scores_of(edit)

    with open_storage(None, folder, "s") as storage:
        opened = study(storage)
        records = list(opened.run(9, each(sometimes)))
        assert [r.number for r in records if r.state == "failed"] == [1, 4, 7]
        assert records[1].error == "NaN logits"
        assert all(record.state == "complete" for record in opened.front)


def test_whatever_a_plug_in_raises_fails_its_trial_alone(folder):
    calls = iter(range(100))

    def strange(edit):
        call = next(calls)
        if call == 1:
            raise RuntimeError("shape mismatch\nand a long story")
        score = scores_of(edit)
        if call == 2:
            score["kl"] = Score(1.0, "x", details={"not json": object()})
        return score

    with open_storage(None, folder, "s") as storage:
        records = list(study(storage).run(5, each(strange)))
    assert [r.state for r in records] == ["complete", "failed", "failed", "complete", "complete"]
    assert records[1].error == "RuntimeError: shape mismatch"
    assert "in strange" in records[1].traceback and "a long story" in records[1].traceback
    assert records[0].traceback is None


def test_a_long_traceback_is_kept_without_its_middle(folder):
    def wordy(edit):
        raise ValueError("x" * 100_000 + "end")

    with open_storage(None, folder, "s") as storage:
        (record, *_) = study(storage).run(1, each(wordy))
    assert len(record.traceback) < 10_000
    assert record.traceback.startswith("Traceback") and record.traceback.rstrip().endswith("end")


def test_a_record_is_parsed_once_however_often_it_is_read(folder, monkeypatch):
    parsed = []
    read = Score.from_dict.__func__
    monkeypatch.setattr(
        Score, "from_dict", classmethod(lambda cls, data: parsed.append(1) or read(cls, data))
    )
    with open_storage(None, folder, "s") as storage:
        ours = study(storage)
        list(ours.run(12, evaluate))
        for _ in range(3):
            assert len(ours.front) <= len(ours.records) == ours.finished == 12
    assert len(parsed) == 12 * len(OBJECTIVES)


def test_a_study_keeps_the_batch_size_it_was_begun_with(folder):
    with open_storage(None, folder, "s") as storage:
        assert stored_batch_size(storage, "s") is None
        study(storage, batch_size=16)
    with open_storage(None, folder, "s") as storage:
        assert stored_batch_size(storage, "s") == 16
        study(storage, batch_size=32)
        assert stored_batch_size(storage, "s") == 16


def test_an_interrupted_known_good_edit_is_measured_after_all(folder):
    def interrupted(edit):
        raise KeyboardInterrupt

    with open_storage(None, folder, "s") as storage:
        with pytest.raises(KeyboardInterrupt):
            list(study(storage).run(3, each(interrupted)))
    with open_storage(None, folder, "s") as storage:
        records = list(study(storage).run(len(SPACE.known_good()), evaluate))
    measured = parameters(records)
    assert all(json.dumps(p, sort_keys=True) in measured for p in SPACE.known_good())


def test_a_search_in_which_everything_fails_stops(folder):
    def broken(edit):
        raise MeasurementError("NaN logits")

    with open_storage(None, folder, "s") as storage:
        with pytest.raises(StudyError, match="5 trials in a row failed; the last: NaN logits"):
            list(study(storage).run(50, each(broken)))


def test_other_settings_are_refused_naming_them(folder):
    with open_storage(None, folder, "s") as storage:
        study(storage, fingerprint={"model": "m", "kl_tokens": 3})
    with open_storage(None, folder, "s") as storage:
        with pytest.raises(StudyError, match=r"other settings \(kl_tokens: 3 there, 8 here\)"):
            study(storage, fingerprint={"model": "m", "kl_tokens": 8})


def test_another_optuna_is_refused_before_anything_is_written(folder, monkeypatch):
    with open_storage(None, folder, "s") as storage:
        list(study(storage).run(2, evaluate))
    journal = folder / "s.journal"
    before = journal.read_bytes()
    monkeypatch.setattr(optuna, "__version__", "4.9.0")
    with open_storage(None, folder, "s") as storage:
        with pytest.raises(StudyError, match=r"other settings \(optuna: 5 there, 4 here\)"):
            study(storage)
    assert journal.read_bytes() == before


def test_other_versions_are_named_and_not_refused(folder):
    begun = {"torch": "2.7.0", "transformers": "5.24.0"}
    for versions, differ in (
        (begun, ""),
        (None, ""),
        (begun, ""),
        ({**begun, "torch": "2.8.0"}, "torch: 2.7.0 there, 2.8.0 here"),
    ):
        with open_storage(None, folder, "s") as storage:
            assert study(storage, versions=versions).other_versions == differ


def test_versions_of_a_later_start_are_not_those_that_a_study_was_begun_with(folder):
    with open_storage(None, folder, "s") as storage:
        list(study(storage).run(1, evaluate))
    for torch in ("2.7.0", "2.8.0"):
        with open_storage(None, folder, "s") as storage:
            assert study(storage, versions={"torch": torch}).other_versions == ""


def test_maximized_scores_are_negated_and_front_follows(folder):
    objectives = (ScorerSpec("refusals", "refusals", "maximize", {}), OBJECTIVES[1])
    with open_storage(None, folder, "s") as storage:
        records = list(study(storage, objectives=objectives).run(3, evaluate))
    assert records[0].objectives[0] == -records[0].scores["refusals"].value


def test_scores_on_the_test_prompts_are_kept(folder):
    with open_storage(None, folder, "s") as storage:
        opened = study(storage)
        assert opened.test_scores(0) is None
        score = Score(0.1, "1/10", standard_error=0.02, interval=(0.0, 0.3), details={"count": 1})
        opened.keep_test_scores(0, {"refusals": score})
    with open_storage(None, folder, "s") as storage:
        assert study(storage).test_scores(0) == {"refusals": score}


def test_sqlite_storage_works_and_bad_urls_are_one_line(tmp_path, folder):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with open_storage(url, folder, "s") as storage:
        assert len(list(study(storage).run(2, evaluate))) == 2
    with pytest.raises(StudyError, match=r"cannot open storage 'mysql://me:\*\*\*@host/db'"):
        with open_storage("mysql://me:secret@host/db", folder, "s"):
            pass
    assert without_password("sqlite:///a.db") == "sqlite:///a.db"


def test_unwritable_and_damaged_places_are_one_line(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(StudyError, match="cannot write studies"):
        with open_storage(None, blocked / "studies", "s"):
            pass
    for name in (None, "s"):
        with pytest.raises(StudyError, match="cannot write studies"):
            check_storage(None, blocked / "studies", name)
    check_storage(None, tmp_path / "fine", None)
    assert not (tmp_path / "fine").exists()
    damaged = tmp_path / "s.journal"
    damaged.write_text("not json\nat all\n")
    with pytest.raises(StudyError, match="damaged"):
        with open_storage(None, tmp_path, "s"):
            pass
