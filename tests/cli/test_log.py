"""The log of a run: what it holds, what it never holds, and what --debug adds."""

import dataclasses

import pytest

from heretic_kl.cli.log import RunLog
from heretic_kl.config import Settings
from heretic_kl.errors import ModelError
from heretic_kl.events import Notice, StageAdvanced, StageStarted, StudyOpened, TrialFinished
from heretic_kl.search import TrialRecord


def opened(name="org/my study"):
    return StudyOpened(name, "studies", 0, 3)


def failed(number=4):
    names = {field.name for field in dataclasses.fields(TrialRecord)}
    values = dict.fromkeys(names)
    values |= {"number": number, "scores": {}, "parameters": {}, "traceback": "Traceback: boom\n"}
    return TrialFinished(TrialRecord(**values), 1, 3, (), None)


def run(tmp_path, *events, error=None, **changes):
    seen = []
    settings = Settings(model="m", study_dir=tmp_path / "studies", **changes)
    try:
        with RunLog(settings, seen.append) as log:
            for event in events:
                log(event)
            if error is not None:
                raise error
    except type(error or ValueError()):
        pass
    (file,) = (tmp_path / "studies").glob("*.log")
    return file, file.read_text(encoding="utf-8"), seen


def test_it_lies_beside_the_study_and_begins_before_it(tmp_path):
    events = [
        StageStarted("load", "Loading m"),
        Notice("look out"),
        opened(),
        StageAdvanced("load"),
    ]
    file, text, seen = run(tmp_path, *events)
    assert file.name == "org_my_study.log" and seen == events
    assert '"torch"' in text and '"model":"m"' in text  # versions, settings
    assert "Loading m" in text and "WARNING notice look out" in text
    assert "StageAdvanced" not in text and text.endswith("ended\n")


def test_a_second_run_appends(tmp_path):
    run(tmp_path, opened())
    _, text, _ = run(tmp_path, opened())
    assert text.count(" settings ") == 2


@pytest.mark.parametrize("debug", [False, True])
def test_a_failed_trial_leaves_its_traceback(tmp_path, capsys, debug):
    _, text, _ = run(tmp_path, opened(), failed(), debug=debug)
    assert "trial 4 failed\nTraceback: boom" in text
    assert ("Traceback: boom" in capsys.readouterr().err) is debug


def test_how_it_ended(tmp_path):
    _, text, _ = run(tmp_path, opened(), error=ModelError("no such model"))
    assert "ended by ModelError: no such model" in text and "Traceback" not in text
    _, text, _ = run(tmp_path, opened(), error=ZeroDivisionError("bug"))
    assert "ended by an error\nTraceback" in text and "ZeroDivisionError: bug" in text


def test_no_secrets(tmp_path):
    notice = Notice("could not reach https://me:pass1@host/x with hf_abcdefghijkl, token=s3cret")
    url = "mysql://me:pass1@host/db"
    _, text, _ = run(tmp_path, notice, opened(), storage=url, error=ValueError(url))
    assert "mysql://me:***@host/db" in text
    for secret in ("pass1", "hf_abc", "s3cret"):
        assert secret not in text


def test_a_folder_that_cannot_be_written_costs_the_log_alone(tmp_path):
    (tmp_path / "studies").write_text("a file")
    seen = []
    with RunLog(Settings(study_dir=tmp_path / "studies"), seen.append) as log:
        log(opened())
    assert any(isinstance(event, Notice) and "no log file" in event.message for event in seen)
