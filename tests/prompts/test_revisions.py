"""A dataset of the hub at a commit, tag or branch: which one is read, and what says so."""

import datasets
import pytest
from hub_server import Repository
from prepared import prepare

from heretic_kl.errors import PromptError
from heretic_kl.prompts import DatasetSpec, dataset_revision, hub, load_prompts

OLD, NEW = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two commits of org/set in the cache of `datasets`; the newer one was read last."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hub.commits.clear()
    for commit, texts in ((OLD, ["a", "b"]), (NEW, ["c"])):
        prepare(tmp_path / "cache", commit, texts)
    return tmp_path / "cache"


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setattr(hub, "_ask_hub", lambda names, timeout: "the hub cannot be reached")


def texts(revision):
    return [prompt.user for prompt in load_prompts(DatasetSpec("org/set", revision=revision))]


def test_a_cached_commit_needs_no_hub_whatever_is_newer(cache, no_hub):
    assert texts(OLD) == ["a", "b"] and texts(NEW) == ["c"]
    assert dataset_revision("org/set", OLD) == OLD
    assert dataset_revision("org/set") is None
    assert texts(None) == ["c"]
    assert dataset_revision("org/set") == NEW, "the one that was read"


@pytest.mark.parametrize("revision", ["3" * 40, "v1", "main"])
def test_no_other_commit_is_read_where_the_hub_does_not_answer(cache, no_hub, revision):
    with pytest.raises(PromptError, match="org/set: the hub cannot be reached"):
        texts(revision)


def test_a_tag_is_read_at_the_commit_that_the_hub_names(cache, hub, tmp_path, monkeypatch):
    branches = {"main": {}, "v1": {"data.jsonl": b"x"}}
    hub.repositories["org/set"] = Repository(private=True, branches=branches)
    commit = hub.repositories["org/set"].sha("v1")
    prepare(cache, commit, ["of the tag"])
    asked = []

    def load(name, subset, revision):
        asked.append((name, subset, revision))
        split = datasets.Dataset.from_file(
            str(cache / f"org___set/default/0.0.0/{commit}/set-train.arrow")
        )
        return datasets.DatasetDict(train=split)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("v1") == ["of the tag"]
    assert asked == [("org/set", None, commit)]
    assert dataset_revision("org/set", "v1") == commit
    with pytest.raises(PromptError, match=r"^org/set: no revision 'v2' on the hub$"):
        texts("v2")
    with pytest.raises(PromptError, match="the hub did not give revision 'main'"):
        texts("main")  # what came is another commit


@pytest.mark.parametrize("revision", ["", "../main", "a/../b", "a b", "-x", "a\n", "/x"])
def test_a_revision_is_no_path(revision):
    with pytest.raises(ValueError, match="revision"):
        DatasetSpec("org/set", revision=revision)


def test_what_is_not_of_the_hub_has_no_revision(tmp_path):
    (tmp_path / "lines.txt").write_text("one\n")
    for source in ("builtin:harmful", str(tmp_path / "lines.txt"), str(tmp_path)):
        with pytest.raises(PromptError, match="no revision 'v1': it is a"):
            load_prompts(DatasetSpec(source, "train", revision="v1"))
    assert DatasetSpec("org/set", "train", revision="v1").describe() == "org/set@v1 train"
