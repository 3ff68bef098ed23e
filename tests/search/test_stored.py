"""A study read back without its model: names, settings, trials, and what is wrong with it."""

import pytest

from heretic_kl.errors import StudyError
from heretic_kl.scoring import Score, ScorerSpec
from heretic_kl.search import (
    UNEDITED,
    SearchSpace,
    SearchStudy,
    keep_run,
    open_storage,
    read_study,
)

OBJECTIVES = [ScorerSpec(name, name, "minimize", {}) for name in ("refusals", "kl")]
BASELINE = {"refusals": Score(0.9, "9/10"), "kl": Score(0.0, "0 nats")}


def scores(edit):
    strength = sum(kernel.peak_weight for kernel in edit.kernels.values())
    return {"refusals": Score(1 / (1 + strength), "r"), "kl": Score(strength, "k")}


def make(folder, name, trials=3, *, kept=True, url=None):
    space = SearchSpace(layers=4)
    with open_storage(url, folder, name) as storage:
        study = SearchStudy(
            storage,
            name,
            fingerprint={"seed": 0},
            space=space,
            objectives=OBJECTIVES,
            seed=0,
            startup_trials=9,
        )
        if kept:
            keep_run(storage, name, {"model": "m", "trials": 3}, space, OBJECTIVES, BASELINE)
        list(study.run(trials, lambda edits: [scores(edit) for edit in edits]))
        study.keep_test_scores(UNEDITED, BASELINE)
        study.keep_test_scores(1, {"kl": Score(0.5, "tested")})
        return study.records, study.front


def test_what_was_kept_is_read_back(tmp_path):
    records, front = make(tmp_path, "mine")
    study = read_study("mine", tmp_path)
    assert (study.records, study.front) == (records, front)
    assert (study.name, study.folder, study.settings["model"]) == ("mine", tmp_path, "m")
    assert study.roles == {"refusals": "minimize", "kl": "minimize"}
    assert study.baseline == study.test_baseline == BASELINE
    assert study.tested == {1: {"kl": Score(0.5, "tested")}}
    assert read_study(str(tmp_path / "mine.journal"), tmp_path / "elsewhere") == study


def test_a_study_is_read_while_another_process_searches(tmp_path):
    make(tmp_path, "mine")
    with open_storage(None, tmp_path, "mine"):
        assert len(read_study("mine", tmp_path).records) == 3


def test_without_a_name_the_newest_study_is_read(tmp_path):
    for name in ("first", "second"):
        make(tmp_path, name, 1)
    assert read_study(None, tmp_path).name == "second"


def test_a_storage_url_is_read(tmp_path):
    url = f"sqlite:///{tmp_path}/studies.db"
    make(tmp_path, "mine", 1, url=url)
    study = read_study(None, tmp_path, url)
    assert (study.name, study.folder, len(study.records)) == ("mine", None, 1)
    with pytest.raises(StudyError, match="there is no study 'other'; the storage holds mine"):
        read_study("other", tmp_path, url)
    make(tmp_path, "second", 1, url=url)
    with pytest.raises(StudyError, match="name one study: the storage holds mine, second"):
        read_study(None, tmp_path, url)


def test_what_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(StudyError, match="there is no study in .*--study-dir"):
        read_study(None, tmp_path)
    make(tmp_path, "model-1234", 1)
    with pytest.raises(StudyError, match="no study 'modl-1234' in .*did you mean model-1234?"):
        read_study("modl-1234", tmp_path)
    with pytest.raises(StudyError, match="there is no study file 'gone.journal'"):
        read_study("gone.journal", tmp_path)
    make(tmp_path, "old", 1, kept=False)
    with pytest.raises(StudyError, match="does not say what it was made with: run its command"):
        read_study("old", tmp_path)
    (tmp_path / "broken.journal").write_bytes(b"not json\nat all\n")
    with pytest.raises(StudyError, match="damaged"):
        read_study("broken", tmp_path)
