"""A whole run on a tiny random model: search, test, pick, save in both forms, resume."""

import json
import shlex
import shutil
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_kl import Session, Settings, events
from heretic_kl.config import load_settings
from heretic_kl.errors import (
    ConfigError,
    ExportError,
    PromptError,
    ScorerError,
    SelectionError,
    SessionError,
    StudyError,
)
from heretic_kl.testing import save_tiny_model, tiny_llama

KINDS = ("harmful", "harmless", "borderline")
WORDS = "how do I make a cake please tell me about the weather in Rome first mix flour".split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model and prompt files; the tiny model refuses nothing, so an odd word is the marker."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_model(folder / "model", tiny_llama())
    for index, name in enumerate(("a", "b")):
        lines = [" ".join(WORDS[(i + index) % 9 :][: 3 + i % 5]) for i in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def settings(workplace, folder, **changes):
    def table(name):
        parts = {"train": "[:6]", "validation": "[6:9]", "test": "[9:]"}
        source = str(workplace / f"{name}.txt")
        return {split: {"source": source, "split": part} for split, part in parts.items()}

    defaults = {
        "model": str(workplace / "model"),
        "device": "cpu",
        "dtype": "float32",
        "trials": 9,
        "startup_trials": 9,
        "max_response_tokens": 6,
        "batch_size": 4,
        "kl_tokens": 3,
        "test_trials": 2,
        "response_prefix": "",
        "prompt_set": "builtin",
        "study_dir": folder / "studies",
        "prompts": {"harmful": table("a"), "harmless": table("b"), "borderline": table("b")},
        "directions": {"by_response": False},  # its responses are as good as drawn by lot
        "scorers": {
            "refusals": {"settings": {"markers": ["flour", "mix"]}},
            "teacher_forced_kl": {"settings": {"set_aside_refused": False}},
        },
    }
    return Settings(**{**defaults, **changes})


def run(workplace, folder, **changes):
    seen = []
    session = Session(settings(workplace, folder, **changes), seen.append)
    return session, seen


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


def test_an_adapter_of_a_resumed_run_is_measured_against_the_unedited_model(workplace, tmp_path):
    """Its hooks sit on the original, whose references must have been computed before."""
    scorers = {
        "scorers": {
            "refusals": {"settings": {"markers": ["flour"]}},
            "kl": {
                "use": "teacher_forced_kl",
                "settings": {"kl_tokens": 2, "set_aside_refused": False},
            },
            "teacher_forced_kl": {"enabled": False},
        }
    }
    first, _ = run(workplace, tmp_path, trials=2, **scorers)
    with first:
        first.search()
        first.test_one(0)
    again, _ = run(workplace, tmp_path, trials=2, **scorers)
    with again:
        saved = again.save(again.trials[0], tmp_path / "adapter", "lora")
    trial, reread = saved.trial_scores["kl"].value, saved.saved_scores["kl"].value
    assert trial > 1e-6
    assert reread == pytest.approx(trial, rel=1e-3)


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


def test_a_saved_model_is_run_as_its_trial_was(workplace, tmp_path, monkeypatch):
    from heretic_kl.run.saving import save

    built = []
    build = save.build_engine

    def recorded(lm, options, **more):
        built.append((options, build(lm, options, **more)))
        return built[-1][1]

    monkeypatch.setattr(save, "build_engine", recorded)
    session, _ = run(workplace, tmp_path, trials=1, batch_size=3, cache_memory_mb=7)
    with session:
        session.search()
        for form in ("merged", "lora"):
            session.save(session.trials[0], str(tmp_path / form), form)
        parts = session.parts
    assert len(built) == 2
    for options, engine in built:
        assert options == parts.engine_options and options.cache_bytes <= 7 * 2**20
        assert engine.batch_size == parts.engine.batch_size
        assert engine.lm.capabilities == parts.engine.lm.capabilities


def test_the_command_of_a_saved_model_makes_it_again(workplace, tmp_path, monkeypatch):
    changes = {"seed": 4, "batch_size": 0, "racing": True, "edit": {"norm": "row"}, "trials": 3}
    session, _ = run(workplace, tmp_path, startup_trials=2, **changes)
    with session:
        session.search()
        record = [trial for trial in session.trials if trial.state == "complete"][-1]
        session.save(record, tmp_path / "out", "lora")
    facts = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    monkeypatch.chdir(workplace)  # the command names files without their folders
    words = [*shlex.split(facts["command"])[1:], "--device", "cpu"]
    again = load_settings([*words, "--study-dir", str(tmp_path / "anew")])
    assert (str(again.save), again.save_as) == ("out", "lora")
    with Session(again) as repeated:
        repeated.search()
        trial = repeated.pick(again.pick)
    assert (trial.number, trial.parameters) == (record.number, record.parameters)
    assert trial.scores == record.scores


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


def test_settings_that_change_scores_make_another_study(workplace, tmp_path):
    one, _ = run(workplace, tmp_path, trials=1, study_name="mine")
    with one:
        one.search()
    other, _ = run(workplace, tmp_path, trials=1, study_name="mine", kl_tokens=2)
    with pytest.raises(StudyError, match=r"other settings \(kl_tokens: 3 there, 2 here\)"):
        with other:
            pass
    named_by_itself, seen = run(workplace, tmp_path, trials=1, seed=5)
    with named_by_itself:
        assert [e for e in seen if isinstance(e, events.StudyOpened)][0].finished == 0


@pytest.mark.parametrize("norm", ["row", "normalized_row"])
def test_norm_modes_run_and_save(workplace, tmp_path, norm):
    session, _ = run(workplace, tmp_path, trials=1, edit={"norm": norm})
    with session:
        session.search()
        saved = session.save(session.trials[0], tmp_path / "out", "merged")
        assert saved.merge_kl <= saved.noise_floor


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
