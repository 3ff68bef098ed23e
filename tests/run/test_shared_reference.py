"""What the original model responds and computes is computed once for all workers of a study."""

import json
import shutil
from collections import Counter

import optuna
import pytest
import torch
from sessions import WORDS, run, settings

from heretic_kl import Session
from heretic_kl.engine import Runner, shared
from heretic_kl.events import Notice
from heretic_kl.search import open_storage
from heretic_kl.search.storage import artifacts, study_names

SHARED = {"keep_responses": "all"}
"""Where prompts of all kinds are the same, too."""


@pytest.fixture
def work(computed, monkeypatch):
    """Counts what the original model does: tokens that it generates, too."""
    respond = Runner._responses

    def responses(runner, *args):
        made = respond(runner, *args)
        computed["tokens"] += sum(len(response.tokens) for response in made)
        return made

    monkeypatch.setattr(Runner, "_responses", responses)
    return computed


def results(session):
    """Whatever a run takes from the original model, and what its trials then score."""
    session.search(until=4)
    directions = session.parts.directions
    return session.baseline, directions, [(r.parameters, r.scores) for r in session.trials]


def opened(workplace, folder, **changes):
    """What an opened run takes from the original model, and its notices."""
    session, seen = run(workplace, folder, **{**SHARED, **changes})
    with session:
        baseline = session.baseline
    return baseline, [event.message for event in seen if isinstance(event, Notice)]


def entries(folder):
    return sorted((folder / "studies").glob("*.original/reference-*.json"))


def whats(folder):
    """How many results of each sort are stored."""
    names = [json.loads(path.read_text())["what"] for path in entries(folder)]
    return Counter(name.partition(" winsorized")[0] for name in names)


def apart(folder):
    """Settings with prompts of which none is of two kinds."""
    folder.mkdir()
    tables = {}
    for place, kind in enumerate(("harmful", "harmless", "borderline")):
        lines = [f"{WORDS[place]} {word} {WORDS[place]}" for word in WORDS[3:15]]
        (folder / f"{kind}.txt").write_text("\n".join(lines))
        parts = {"train": "[:6]", "validation": "[6:9]", "test": "[9:]"}
        source = {"source": str(folder / f"{kind}.txt")}
        tables[kind] = {use: {**source, "split": part} for use, part in parts.items()}
    return {"prompts": tables}


def store_of(folder):
    (place,) = (folder / "studies").glob("*.original")
    return artifacts.ReferenceStore(place.parent, place.name.removesuffix(".original"))


def test_a_worker_that_joins_computes_nothing_again_and_scores_the_same(workplace, tmp_path, work):
    opened(workplace, tmp_path / "shared")
    alone = dict(work)
    assert alone["tokens"] > 20 and alone["passes"] == 1 and alone["prompts read"] == 24
    work.clear()
    seen = []
    chosen = settings(workplace, tmp_path / "shared", **SHARED)
    with Session(chosen, seen.append, joins=True) as joining:
        assert not any(work.values())
        joined = results(joining)
    assert not [event for event in seen if isinstance(event, Notice) and "again" in event.message]
    work.clear()
    fresh, _ = run(workplace, tmp_path / "anew", **SHARED)
    with fresh:
        assert dict(work) == alone
        baseline, directions, trials = results(fresh)
    assert joined[0] == baseline and joined[2] == trials and len(trials) == 4
    assert torch.equal(joined[1].per_layer, directions.per_layer)


def test_hidden_states_come_from_the_same_arithmetic_responses_from_any(
    workplace, tmp_path, work, monkeypatch
):
    opened(workplace, tmp_path)
    work.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    opened(workplace, tmp_path)
    assert work["passes"] == 1 and not work["tokens"] and not work["prompts read"]
    monkeypatch.setattr(shared, "processor", lambda: "another one with AVX512")
    opened(workplace, tmp_path)
    assert work["passes"] == 2 and not work["tokens"] and not work["prompts read"]


def test_states_that_are_not_exactly_this_machines_are_computed_again(workplace, tmp_path, work):
    baseline, _ = opened(workplace, tmp_path)
    store = store_of(tmp_path)
    for entry in entries(tmp_path):
        if "hidden" in json.loads(entry.read_text())["what"]:
            key = entry.stem.removeprefix("reference-")
            values = store.load(key)["values"]
            values[-1, 0] += 1e-3
            assert store.save(key, {}, {"values": values}, replace=True)
    work.clear()
    again, notices = opened(workplace, tmp_path)
    assert again == baseline and again["teacher_forced_kl"].value == 0
    assert sum("are not exactly this machine's" in notice for notice in notices) == 1
    assert work["passes"] == 1 and not work["tokens"]


def test_another_model_dtype_or_prompt_finds_nothing(workplace, tmp_path, work):
    opened(workplace, tmp_path, study_name="s")
    work.clear()
    with pytest.raises(Exception, match="other"):
        opened(workplace, tmp_path, study_name="s", dtype="bfloat16")
    assert work["tokens"] and work["passes"] and work["prompts read"]


def torn(folder):
    for entry in entries(folder):
        path = entry.parent / json.loads(entry.read_text())["sha256"]
        path.write_bytes(path.read_bytes()[:-8])


def missing(folder):
    for path in (folder / "studies").glob("*.original/" + 64 * "[0-9a-f]"):
        path.unlink()


def foreign(folder):
    """Each entry names what belongs to the next one, which is whole."""
    paths = entries(folder)
    texts = [path.read_text() for path in paths]
    for path, text in zip(paths, texts[1:] + texts[:1], strict=True):
        path.write_text(text)


def no_entry(folder):
    for path, text in zip(
        entries(folder), ("", "[]", '{"sha256": 3}', "[" * 9000, "{}"), strict=False
    ):
        path.write_text(text)


@pytest.mark.parametrize("damage", [torn, missing, foreign, no_entry])
def test_what_is_not_what_was_kept_is_computed_again_with_a_notice(
    workplace, tmp_path, work, damage
):
    baseline, notices = opened(workplace, tmp_path)
    assert not any("again" in notice for notice in notices)
    damage(tmp_path)
    work.clear()
    again, notices = opened(workplace, tmp_path)
    assert again == baseline and work["tokens"]
    damaged = [notice for notice in notices if "are computed again: " in notice]
    assert len(damaged) >= (5 if damage is no_entry else len(entries(tmp_path)))
    work.clear()
    opened(workplace, tmp_path)  # what was computed again has replaced it
    assert not any(work.values())


def test_what_fits_its_hash_but_not_the_question_is_not_used(workplace, tmp_path, work):
    """Tensors of other shapes under the right hash: from a file that somebody made up."""
    baseline, _ = opened(workplace, tmp_path)
    store = store_of(tmp_path)
    for entry in entries(tmp_path):
        key = entry.stem.removeprefix("reference-")
        tensors = store.load(key)
        wrong = {part: values[:-1] + 60_000 for part, values in tensors.items()}
        store.save(key, {}, wrong, replace=True)
    again, notices = opened(workplace, tmp_path)
    assert again == baseline
    assert sum("asked for" in notice for notice in notices) == len(entries(tmp_path))


def test_what_is_too_large_is_not_shared_and_the_run_says_so(
    workplace, tmp_path, work, monkeypatch
):
    monkeypatch.setattr(artifacts, "MOST_BYTES", 4000)
    monkeypatch.setattr(artifacts, "MOST_ENTRY_BYTES", 2000)
    _, notices = opened(workplace, tmp_path)
    assert any("residuals are not shared with other workers" in notice for notice in notices)
    work.clear()
    opened(workplace, tmp_path)
    assert work["prompts read"] and not work["tokens"]


def test_a_folder_that_cannot_be_written_costs_the_sharing_alone(workplace, tmp_path, work):
    baseline, _ = opened(workplace, tmp_path / "a", study_name="s")
    (tmp_path / "b" / "studies").mkdir(parents=True)
    (tmp_path / "b" / "studies" / "s.original").write_text("in the way")
    again, notices = opened(workplace, tmp_path / "b", study_name="s")
    assert again == baseline and any("not shared with other workers" in n for n in notices)


OF_HARMLESS = {"responses": 1, "final hidden states": 1, "residuals": 1, "residual means": 2}
OF_ALL = {"responses": 2, "final hidden states": 1, "residuals": 2, "residual means": 2}


@pytest.mark.parametrize(
    ("keep", "stored"),
    [
        ("none", {"residual means": 2}),
        ("report", OF_HARMLESS),
        ("harmless", OF_HARMLESS),
        ("all", OF_ALL),
    ],
)
def test_no_token_of_a_response_is_on_the_disk_that_is_not_to_be_kept(
    workplace, tmp_path, work, keep, stored
):
    """Hidden states and single residuals tell tokens, too: the head makes them of these."""
    changes = {**apart(tmp_path / "prompts"), "keep_responses": keep}
    baseline, _ = opened(workplace, tmp_path, **changes)
    assert whats(tmp_path) == stored
    alone = dict(work)
    work.clear()
    again, _ = opened(workplace, tmp_path, **changes)
    assert again == baseline
    assert (work["tokens"] > 0) == (keep != "all") and work["tokens"] <= alone["tokens"]
    assert work["prompts read"] == {"none": 12, "all": 0}.get(keep, 6)
    assert work["passes"] == (keep == "none")


def test_prompts_of_a_scorer_are_not_known_to_be_harmless(workplace, tmp_path, work):
    changes = apart(tmp_path / "prompts")
    harmful = {"source": str(tmp_path / "prompts" / "harmful.txt"), "split": "[6:9]"}
    table = {"settings": {"set_aside_refused": False, "prompts": harmful}}
    scorers = {"refusals": {}, "teacher_forced_kl": table}
    for keep, responses, states in (("report", 1, 1), ("all", 3, 2)):
        folder = tmp_path / keep
        opened(workplace, folder, **changes, scorers=scorers, keep_responses=keep)
        counts = whats(folder)  # the noise floor is measured over harmless prompts
        assert (counts["responses"], counts["final hidden states"]) == (responses, states)


def test_what_is_shared_can_be_deleted_alone(workplace, tmp_path, work):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    baseline, _ = opened(workplace, tmp_path / "a", study_name="s", storage=url)
    folder = tmp_path / "a" / "studies" / "s.original"
    with open_storage(url, tmp_path, "s") as storage:
        assert study_names(storage) == ["s"]
    optuna.delete_study(study_name=folder.name, storage=url)
    shutil.rmtree(folder)
    work.clear()
    again, notices = opened(workplace, tmp_path / "a", study_name="s", storage=url)
    assert again == baseline and work["tokens"]
    assert not any("again" in notice for notice in notices)


def test_machines_that_share_the_storage_alone_share_results(workplace, tmp_path, work):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    baseline, _ = opened(workplace, tmp_path / "here", storage=url)
    work.clear()
    again, _ = opened(workplace, tmp_path / "elsewhere", storage=url)
    assert again == baseline and not any(work.values())


def test_a_store_that_only_reads_changes_no_storage(tmp_path):
    url = f"sqlite:///{tmp_path / 'x.db'}"
    with open_storage(url, tmp_path, "s") as storage:
        store = artifacts.ReferenceStore(tmp_path, "s", storage, reads_only=True)
        assert store.load(64 * "a") is None
        store.save(64 * "a", {}, {"values": torch.ones(3)})
        assert store.load(64 * "a") is None and not storage.get_all_studies()
    assert not list(tmp_path.glob("*.artifacts"))
