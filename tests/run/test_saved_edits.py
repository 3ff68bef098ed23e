"""A saved edit: its command, how it is run again, adapters, norm modes."""

import json
import shlex

import pytest
from sessions import run

from heretic_kl import Session
from heretic_kl.config import load_settings


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


@pytest.mark.parametrize("norm", ["row", "normalized_row"])
def test_norm_modes_run_and_save(workplace, tmp_path, norm):
    session, _ = run(workplace, tmp_path, trials=1, edit={"norm": norm})
    with session:
        session.search()
        saved = session.save(session.trials[0], tmp_path / "out", "merged")
        assert saved.merge_kl <= saved.noise_floor
