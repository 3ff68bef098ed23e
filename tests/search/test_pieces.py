"""Scores, settings and learned edits larger than MySQL holds in one attribute, on every storage."""

import gc
import json

import pytest
from optuna.storages import InMemoryStorage
from servers import database
from studies import OBJECTIVES, SPACE, each, scores_of, study

from heretic_kl.ablation import Refinement
from heretic_kl.errors import StudyError
from heretic_kl.scoring import Score
from heretic_kl.search import UNEDITED, keep_run, open_storage, read_study
from heretic_kl.search.storage import pieces
from heretic_kl.search.storage.pieces import PIECES, in_pieces, keep, whole

MYSQL_BYTES = 65_535
SCORERS, PROMPTS = 15, 400


def large_scores(edit=None):
    """Of several scorers, with a value for each prompt, and texts of any language."""
    scores = {} if edit is None else scores_of(edit)
    strength = scores["kl"].value if edit else 1.0
    values = tuple(float(f"{strength / (7 + i):.7g}") for i in range(PROMPTS))
    score = Score(strength, "größer 更大 \\", per_prompt=values)
    return {**scores, **{f"more{i}": score for i in range(SCORERS)}}


@pytest.fixture(params=["journal", "sqlite", "postgresql", "mysql"])
def url(request, tmp_path):
    files = {"journal": None, "sqlite": f"sqlite:///{tmp_path / 'x.db'}"}
    if request.param in files:
        yield files[request.param]
        return
    with database(request.param) as where:
        yield where


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # whoever reads alone keeps connections
def test_large_attributes_are_stored_in_pieces_and_read_whole(url, tmp_path):
    baseline, settings = large_scores(), {"system": '"\\' * 70_000}
    fingerprint = {"model": "m", "markers": ["so sorry"] * 9000}
    with open_storage(url, tmp_path, "s") as storage:
        opened = study(storage, fingerprint=fingerprint)
        keep_run(storage, "s", {}, SPACE, OBJECTIVES, baseline)
        keep_run(storage, "s", settings, SPACE, OBJECTIVES, baseline)
        (record,) = opened.run(1, each(large_scores))
        learned = Refinement("0" * 64, record.number, 1, "factors", 1, 0.05)
        refined = opened.add_refined(record, learned, large_scores(record.edit), 1.0)
        opened.keep_test_scores(UNEDITED, baseline)
        opened.keep_test_scores(0, record.scores)
        stored = [storage.get_study_user_attrs(opened._study._study_id)]
        stored += [t.user_attrs for t in opened._study.get_trials(deepcopy=False)]
    sizes = [len(json.dumps(value)) for attributes in stored for value in attributes.values()]
    assert max(sizes) < MYSQL_BYTES and sum(sizes) > 6 * MYSQL_BYTES
    with open_storage(url, tmp_path, "s") as storage:
        again = study(storage, fingerprint=fingerprint)
        assert again.records == (record, refined) and again.test_scores(0) == record.scores
        with pytest.raises(StudyError, match="was made with other settings"):
            study(storage, fingerprint={"model": "m"})
    read = read_study("s", tmp_path, url)
    assert read.records == (record, refined) and read.tested == {0: record.scores}
    assert read.settings == settings and read.baseline == read.test_baseline == baseline
    assert record.scores == large_scores(record.edit)
    gc.collect()


def test_what_was_stored_in_one_is_still_read(tmp_path, monkeypatch):
    with monkeypatch.context() as earlier, open_storage(None, tmp_path, "s") as storage:
        earlier.setattr(pieces, "MOST_CHARACTERS", 10**9)
        opened = study(storage)
        keep_run(storage, "s", {}, SPACE, OBJECTIVES, large_scores())
        (record,) = opened.run(1, each(large_scores))
        assert PIECES not in str(opened._study.user_attrs)
    assert read_study("s", tmp_path).records == (record,)


def test_a_short_attribute_stays_as_it_is_and_a_long_one_comes_back():
    short = {"a": "x" * 59_000, "b": {"c": 1}, "d": None}
    assert in_pieces(short) == short and whole(short, "b") == {"c": 1}
    for value in ("\\\"'" * 40_000, "文" * 30_000, {"list": [*range(20_000)]}):
        written = in_pieces({"a": value})
        assert max(len(json.dumps(part)) for part in written.values()) < MYSQL_BYTES
        assert list(written)[-1] == "a" and whole(written, "a") == value
    assert whole({}, "a") is None and whole({}, "a", 3) == 3


@pytest.mark.parametrize("damage", ["missing", "no list", "other", "a thousand times"])
def test_damaged_pieces_are_one_line(tmp_path, damage):
    with open_storage(None, tmp_path, "s") as storage:
        opened = study(storage)
        list(opened.run(1, each(large_scores)))
        keep_run(storage, "s", {}, SPACE, OBJECTIVES, large_scores())
        attributes = opened._study.user_attrs
        names = attributes["heretic-kl:run"][PIECES]
        bad = {"missing": ["none"], "no list": 7, "other": names[1:]}
        bad["a thousand times"] = names * 1000
        opened._study.set_user_attr("heretic-kl:run", {PIECES: bad[damage]})
    if damage == "a thousand times":  # asks for no more memory than the study has text
        assert read_study("s", tmp_path).baseline == large_scores()
        return
    with pytest.raises(StudyError, match="study 's' is damaged, or another program wrote it"):
        read_study("s", tmp_path)


def test_a_run_whose_pieces_are_not_all_written_leaves_the_one_before():
    storage = InMemoryStorage()
    opened = study(storage)._study
    keep(opened, "run", "a" * 70_000)
    for name, value in list(in_pieces({"run": "b" * 70_000}).items())[:-1]:
        opened.set_user_attr(name, value)
    assert whole(opened.user_attrs, "run") == "a" * 70_000
