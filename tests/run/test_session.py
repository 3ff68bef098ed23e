"""A whole run on a tiny random model: search, test, pick, save in both forms, resume."""

import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sessions import KINDS, run, settings

from heretic_kl import Session, events
from heretic_kl.errors import (
    ConfigError,
    ExportError,
    PromptError,
    ScorerError,
    SelectionError,
    SessionError,
    StudyError,
)
from heretic_kl.run import parts
from heretic_kl.run.setup import open_run
from heretic_kl.testing import tiny_llama


def test_a_run_from_model_to_saved_edit(workplace, tmp_path):
    session, seen = run(workplace, tmp_path)
    with session:
        session.search()
        session.test()
        record = session.pick("knee")
        saved = session.save(record, tmp_path / "out", "merged")
        assert saved.merge_kl <= saved.noise_floor
        kl = {
            which: scores["teacher_forced_kl"].value
            for which, scores in (("trial", saved.trial_scores), ("saved", saved.saved_scores))
        }
        assert kl["saved"] == pytest.approx(kl["trial"], rel=1e-3)
        assert saved.saved_scores["refusals"].value == saved.trial_scores["refusals"].value
        adapter = session.save(record, tmp_path / "adapter", "lora")
        assert adapter.merge_kl <= adapter.noise_floor
        pieces = list(session.stream_response(record, [{"role": "user", "content": "make a"}], 5))
        assert isinstance("".join(pieces), str)
    kinds = [type(event) for event in seen]
    for kind in (
        events.ModelLoaded,
        events.CalibrationStep,
        events.BaselineMeasured,
        events.StudyOpened,
        events.TrialFinished,
        events.TrialTested,
        events.TrialPicked,
        events.ModelSaved,
    ):
        assert kind in kinds, kind
    assert kinds.count(events.TrialFinished) == 9
    (stage,) = [e for e in seen if isinstance(e, events.StageStarted) and e.stage == "test"]
    advanced = [e for e in seen if isinstance(e, events.StageAdvanced) and e.stage == "test"]
    assert len(advanced) == stage.steps
    facts = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert facts["trial"]["number"] == record.number and facts["seed"] == 0
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert str(workplace) not in (tmp_path / "out" / "reproduce.json").read_text()
    (path,) = (tmp_path / "studies").glob("*.report.json")
    recorded = json.loads(path.read_text())
    assert str(workplace) not in path.read_text()
    layers = tiny_llama().num_hidden_layers
    assert len(recorded["directions"]["layers"]["auroc"]) == layers and recorded["test_prompts"]
    assert recorded["responses"].keys() >= {"reference", str(record.number)}
    assert recorded["saved"] == {"trial": record.number}
    shown = recorded["responses"][str(record.number)]
    assert [*shown] == ["harmless"] and len(shown["harmless"]) == 3
    assert f"trial={record.number}" in recorded["commands"][str(record.number)]


def test_responses_of_the_original_and_of_an_edit_may_be_asked_for_in_turn(workplace, tmp_path):
    session, _ = run(workplace, tmp_path, trials=3)
    with session:
        session.search()
        line, record = [{"role": "user", "content": "make a cake"}], session.trials[0]
        alone = [list(session.stream_response(who, line, 6)) for who in (None, record)]
        streams = [session.stream_response(who, line, 6) for who in (None, record)]
        pairs = list(zip_longest(*streams))
        assert [[p for p in side if p is not None] for side in zip(*pairs, strict=True)] == alone
        assert list(session.stream_response(None, line, 6)) == alone[0], "no edit stays in force"
        for kind in ("harmless", "harmful"):
            original = session.responses(None, kind, 2)
            edited = session.responses(record, kind, 2)
            assert [r.prompt for r in original] == [r.prompt for r in edited]
            rule = session.parts.suite.refusal_rule
            assert all(r.refuses == rule.is_refusal(r.text) for r in (*original, *edited))
            assert session.responses(None, kind, 2) == original and len(original) == 2
        measured = record.scores["refusals"].details["degenerate_at"]
        previewed = session.responses(record, "harmful", 99)
        broken = {str(at): r.degeneracy for at, r in enumerate(previewed) if r.degeneracy}
        assert broken == measured, "by the scorer's rule"
        warm = {"temperature": 5.0, "seed": 1}
        drawn = [list(session.stream_response(None, line, 6, **warm)) for _ in range(2)]
        assert drawn[0] == drawn[1] != alone[0]
        assert alone[0] != alone[1] or original != edited, "the edit changes something"


@pytest.mark.parametrize(("kept", "kinds"), [("none", set()), ("all", {*KINDS})])
def test_responses_are_kept_as_the_user_says(workplace, tmp_path, kept, kinds):
    session, _ = run(workplace, tmp_path, trials=1, keep_responses=kept)
    with session:
        session.search()
        session.test_one(0)
    (path,) = (tmp_path / "studies").glob("*.report.json")
    responses = json.loads(path.read_text())["responses"]
    assert {*responses["0"]} == {*responses.get("reference", {})} == kinds


def test_a_second_run_continues_the_first(workplace, tmp_path):
    first, _ = run(workplace, tmp_path, trials=3)
    with first:
        first.search()
        earlier = first.trials
    second, seen = run(workplace, tmp_path, trials=5)
    with second:
        second.search()
        assert second.trials[:3] == earlier
    (opened,) = [event for event in seen if isinstance(event, events.StudyOpened)]
    assert opened.finished == 3


def test_weights_are_untouched_by_a_search(workplace, tmp_path):
    session, _ = run(workplace, tmp_path, trials=3)
    with session:
        lm = session.parts.lm
        before = {k: v.clone() for k, v in lm.model.state_dict().items()}
        session.search()
        after = lm.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_batch_size_of_a_study_is_kept_unless_the_user_sets_one(
    workplace, tmp_path, monkeypatch
):
    """The clock finds another one the next time, and in bfloat16 that changes scores."""
    from heretic_kl.run.setup import calibrate

    sizes = iter((3, 5))
    monkeypatch.setattr(calibrate, "find_batch_size", lambda *_, **__: next(sizes))
    measured = {"trials": 1, "batch_size": 0}
    for changes, expected in (({}, 3), ({}, 3), ({"batch_size": 2}, 2), ({}, 3)):
        session, _ = run(workplace, tmp_path, **{**measured, **changes})
        with session:
            assert session.calibration.batch_size == session.parts.engine.batch_size == expected
            session.search()


def test_only_one_place_builds_engines():
    from heretic_kl import run as package

    folder = Path(package.__file__).parent
    calls = {path.name: path.read_text().count(" Engine(") for path in folder.glob("*.py")}
    assert {name for name, count in calls.items() if count} == {"engines.py"}


def test_no_observer_is_needed_and_outside_its_block_a_session_says_so(workplace, tmp_path):
    session = Session(settings(workplace, tmp_path, trials=1))
    uses = (
        session.search,
        session.test,
        lambda: session.front,
        lambda: session.baseline,
        lambda: session.pick("knee"),
        lambda: next(session.stream_response(None, [], 1)),
    )
    for use in uses:
        with pytest.raises(SessionError, match="the session is not open: use it as `with"):
            use()
    with session:
        session.search()
        assert len(session.front) == 1
    with pytest.raises(SessionError, match="is not open"):
        session.search()
    with session:  # a session can be opened again
        assert len(session.trials) == 1


def test_a_failed_trial_keeps_its_traceback(workplace, tmp_path):
    scorer = tmp_path / "broken.py"
    scorer.write_text(
        "from heretic_kl.scoring import Scorer\n"
        "class Broken(Scorer):\n"
        "    prepared = 0\n"
        "    def requests(self): return []\n"
        "    def score(self, results):\n"
        "        Broken.prepared += 1\n"
        "        if Broken.prepared == 1:\n"
        "            from heretic_kl.scoring import Score\n"
        "            return Score(1.0, 'x')\n"
        "        return {}['x']\n"
    )
    scorers = {"broken": {"use": f"{scorer}:Broken", "role": "minimize"}}
    session, _ = run(workplace, tmp_path, trials=1, scorers=scorers)
    with session:
        session.search()
        (record,) = session.trials
    assert record.state == "failed" and "KeyError: 'x'" in record.error
    assert "broken.py" in record.traceback and "return {}['x']" in record.traceback


def test_a_library_leaves_the_process_as_it_is(workplace, tmp_path):
    import optuna

    before = optuna.logging.get_verbosity(), torch.get_num_threads()
    session, _ = run(workplace, tmp_path, trials=1, threads=torch.get_num_threads() + 1)
    with session:
        session.search()
        assert (optuna.logging.get_verbosity(), torch.get_num_threads()) == before


def test_a_study_is_not_continued_with_other_weights(workplace, tmp_path):
    one, _ = run(workplace, tmp_path, trials=1, study_name="mine")
    with one:
        one.search()
    for name in ("other", "changed"):
        shutil.copytree(workplace / "model", tmp_path / name)
    weights = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    for name, refused in (("other", False), ("changed", True)):
        session, _ = run(
            workplace, tmp_path, trials=1, study_name="mine", model=str(tmp_path / name)
        )
        with (
            pytest.raises(
                StudyError, match=r"other settings \(model weights: \w+ there, \w+ here\)"
            )
            if (refused)
            else nullcontext()
        ):
            with session:
                pass


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"storage": "sqlite:////no/such/folder/x.db"}, StudyError),
        ({"model": None}, ConfigError),
        ({"pick": "best"}, SelectionError),
        ({"scorers": {"mine": {"use": "refusal"}}}, ScorerError),
        ({"prompts": {"harmful": {"train": {"source": "none.txt"}}}}, PromptError),
    ],
)
def test_wrong_settings_show_before_a_model_is_loaded(workplace, tmp_path, changes, error):
    session, seen = run(workplace, tmp_path, **changes)
    with pytest.raises(error) as raised:
        session.__enter__()
    assert raised.value.exit_code == 2
    assert not seen


def test_settings_that_change_scores_make_another_study(workplace, tmp_path, monkeypatch):
    one, _ = run(workplace, tmp_path, trials=1, study_name="mine")
    with one:
        one.search()
    monkeypatch.setattr(open_run, "installed_versions", lambda: {"torch": "0.1"})
    again, seen = run(workplace, tmp_path, trials=1, study_name="mine")
    with again:
        notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any("begun with other versions" in n and ", 0.1 here" in n for n in notices)
    other, _ = run(workplace, tmp_path, trials=1, study_name="mine", kl_tokens=2)
    with pytest.raises(StudyError, match=r"other settings \(kl_tokens: 3 there, 2 here\)"):
        with other:
            pass
    named_by_itself, seen = run(workplace, tmp_path, trials=1, seed=5)
    with named_by_itself:
        assert [e for e in seen if isinstance(e, events.StudyOpened)][0].finished == 0


@pytest.mark.parametrize("rungs", [False, True], ids=["responses", "rungs"])
@pytest.mark.parametrize("role", ["minimize", "monitor"])
def test_an_edit_that_gives_nan_logits_fails_its_trial_alone(
    workplace, tmp_path, monkeypatch, role, rungs
):
    """Real operators, of which those of the second trial scale the residual stream to overflow."""
    build, built = parts.build_plan, []

    def sometimes(*arguments):
        plan = build(*arguments)
        built.append(plan)
        if len(built) != 2:
            return plan
        return {key: replace(o, left=o.left * math.inf) for key, o in plan.items()}

    monkeypatch.setattr(parts, "build_plan", sometimes)
    scorers = settings(workplace, tmp_path).model_dump(exclude_unset=True)["scorers"]
    scorers["teacher_forced_kl"]["role"] = role
    changes = {"scorers": scorers, "refine": rungs, "refinement": {"trials": 1, "steps": 2}}
    session, _ = run(workplace, tmp_path, trials=5, **changes)
    with session:
        session.search()
        session.refine()
        records = session.parts.study.records
        assert [r.number for r in records if r.state == "failed"] == [1]
        searched = [r for r in records if not r.refinement]
        assert len(searched) == 5 and (len(records) > 5) == rungs
        if rungs:
            assert all(0 <= r.predicted["refusals"] <= 1 for r in records if r.number != 1)
        assert "not finite" in records[1].error or "NaN" in records[1].error
        assert records[1].number not in [record.number for record in session.front]


def test_what_cannot_be_met_is_refused_before_the_search(workplace, tmp_path):
    session, seen = run(workplace, tmp_path, pick="max-false_refusals=0.1")
    with pytest.raises(SelectionError, match="no objective 'false_refusals'"):
        with session:
            pass
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    session, seen = run(workplace, tmp_path, save=tmp_path / "taken", pick="knee")
    with pytest.raises(ExportError, match="taken"):
        with session:
            pass
    assert not any(isinstance(event, events.ModelLoaded) for event in seen)


def test_prompts_of_the_test_that_trials_were_measured_on_are_noticed(workplace, tmp_path):
    changed = settings(workplace, tmp_path).model_dump()["prompts"]
    changed["harmful"]["test"]["split"] = "[6:9]"
    session, seen = run(workplace, tmp_path, trials=0, prompts=changed)
    with session:
        assert session.front == ()
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any("3 of 3 harmful test prompts are also validation prompts" in n for n in notices)
