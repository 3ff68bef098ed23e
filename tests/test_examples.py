"""The examples run, offline, and do what they say."""

import json
import runpy
import sys
from pathlib import Path

import optuna
import pytest
import torch
from judging.chat_server import chat_server

from heretic_kl.config import load_settings
from heretic_kl.run.setup.open_run import check_settings
from heretic_kl.testing import save_tiny_model, tiny_llama

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_llama())


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def rounding():
    before = optuna.logging.get_verbosity()
    yield runpy.run_path(str(EXAMPLES / "weight_rounding.py"))
    optuna.logging.set_verbosity(before)


def run(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_notebook_measures_itself_a_rounded_copy_and_a_candidate(
    folder, tmp_path, monkeypatch, capsys
):
    other = save_tiny_model(tmp_path / "other", tiny_llama(), seed=1)
    found = run(
        "teacher_forced_kl.py",
        monkeypatch,
        *("--model", str(folder), "--candidate", str(other), "--kl-tokens", "4", "--prompts", "8"),
        "--of-a-notebook",
    )
    assert found["itself"].kl == 0.0
    assert 0.0 < found["six_bits"].kl < found["fine_tune"].kl
    shown = capsys.readouterr().out
    assert "distinguishable" in shown and shown.count("±") >= 2 * 4


def test_rounding_searches_two_objectives_and_writes_its_front(folder, tmp_path, rounding, capsys):
    out = tmp_path / "front.json"
    rounding["main"](
        ["--model", str(folder), "--trials", "4", "--kl-tokens", "3", "--prompts", "8"]
        + ["--json", str(out)]
    )
    rows = json.loads(out.read_text())["front"]
    assert 1 <= len(rows) <= 4
    assert [row["bits"] for row in rows] == sorted(row["bits"] for row in rows)
    assert all(row["test"]["standard_error"] > 0.0 for row in rows)
    assert [row["differs_from_row_above"] is None for row in rows] == [
        index == 0 for index in range(len(rows))
    ]
    shown = capsys.readouterr().out
    assert shown.count("±") == len(rows) and "noise floor" in shown
    alike = sum(row["differs_from_row_above"] is False for row in rows)
    assert shown.count("indistinguishable") == alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_restores_every_weight_bit_for_bit(folder, rounding, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    edit = rounding["RoundedWeights"](model)
    trial = optuna.trial.FixedTrial(dict.fromkeys(edit.parts, 3))
    with pytest.raises(KeyboardInterrupt), edit(trial):
        changed = {
            name for name, weight in model.state_dict().items() if not weight.equal(before[name])
        }
        raise KeyboardInterrupt
    assert len(changed) == 3 * 7  # layers; linear weights of each
    assert edit.mean_bits(trial) == 3.0
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())


def test_rounding_to_a_bit_depth_leaves_that_many_levels(rounding):
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    few = rounding["rounded"](weight, 3)
    assert all(len(row.unique()) <= 2**3 - 1 for row in few)
    assert torch.allclose(few.abs().amax(dim=1), weight.abs().amax(dim=1))
    error = (few - weight).abs().amax(dim=1)
    assert bool((error <= weight.abs().amax(dim=1) / 3 / 2 * 1.0001).all())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_configuration_of_another_behaviour_can_be_run(path, monkeypatch, folder, tmp_path):
    """Its prompts and scorers are there, and every prompt of one use is another one."""
    monkeypatch.chdir(EXAMPLES.parent)
    words = ["--config", str(path), "--model", str(folder), "--study-dir", str(tmp_path)]
    with chat_server() as server:
        if "[scorers.judge]" in path.read_text(encoding="utf-8"):
            words += ["--scorers.judge.settings.endpoint", server.url]
        suite, prompts = check_settings(load_settings(words))
    assert {spec.role for spec in suite.objectives} <= {"minimize", "maximize"}
    assert len(suite.objectives) >= 2 and prompts.notices == ()
    for prompt_set in prompts.prompts.values():
        assert len(prompt_set) >= 16


def test_the_guide_states_what_the_results_file_holds(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    results = json.loads((EXAMPLES.parent / "benchmarks/results/behaviours.json").read_text())
    table = runpy.run_path(str(EXAMPLES.parent / "benchmarks/behaviours.py"))["table"]
    guide = (EXAMPLES.parent / "docs/scorers.md").read_text(encoding="utf-8")
    assert "\n".join(table(results["behaviours"])) in guide
    questions = (EXAMPLES / "prompts" / "advice_test.txt").read_text(encoding="utf-8").splitlines()
    assert f"tests with {len(questions)} other questions" in guide
    assert set(results["behaviours"]) == {"over_refusal", "overused_phrases", "hedging"}
