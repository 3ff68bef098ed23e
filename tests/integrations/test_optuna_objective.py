"""The objective in real Optuna studies, on a tiny model."""

import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import optuna
import pytest
import torch

from heretic_kl.integrations import KLObjective, MeasurementError
from heretic_kl.score import TeacherForcedKL
from heretic_kl.testing import save_tiny_model, tiny_llama, tiny_tokenizer

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake"]


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = save_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_llama())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def kl(model):
    return TeacherForcedKL(model, tiny_tokenizer(), prompts=PROMPTS, kl_tokens=3)


def scaling(model, low=0.5, high=1.0):
    """The last down-projection times a factor that the trial chooses."""
    weight = model.model.layers[-1].mlp.down_proj.weight

    @contextmanager
    def candidate(trial):
        original = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(trial.suggest_float("factor", low, high))
        try:
            yield model
        finally:
            with torch.no_grad():
                weight.copy_(original)

    return candidate


def study(**options):
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), **options)


def test_a_study_minimizes_the_kl_and_keeps_what_stands_behind_it(model, kl):
    objective = KLObjective(kl, scaling(model))
    ran = study()
    ran.enqueue_trial({"factor": 1.0})
    ran.optimize(objective, n_trials=4)
    assert ran.best_params == {"factor": 1.0} and ran.best_value == 0.0
    for trial in ran.trials:
        kept = trial.user_attrs["teacher_forced_kl"]
        assert json.loads(json.dumps(kept, allow_nan=False)) == kept
        measured = objective.measurements[trial.number]
        assert kept == measured.to_dict() and kept["mean"] == trial.value
        assert kept["standard_error"] is not None and kept["noise_floor"] is not None


def test_further_objectives_follow_the_kl(model, kl):
    def also(trial, candidate):
        assert candidate is model
        return (trial.params["factor"],)

    ran = study(directions=["minimize", "minimize"])
    ran.optimize(KLObjective(kl, scaling(model), also=also), n_trials=3)
    assert all(trial.values[1] == trial.params["factor"] for trial in ran.trials)
    assert all(trial.values[0] > 0.0 for trial in ran.trials)


def test_nan_fails_the_trial_and_not_the_study(model, kl):
    @contextmanager
    def broken(trial):
        with scaling(model)(trial) as scaled:
            if trial.suggest_categorical("broken", [True, False]):
                scaled.model.layers[-1].mlp.down_proj.weight.data[0, 0] = float("nan")
            yield scaled

    ran = study()
    ran.enqueue_trial({"broken": True})
    ran.enqueue_trial({"broken": False})
    ran.optimize(KLObjective(kl, broken), n_trials=2, catch=(MeasurementError,))
    assert [trial.state.name for trial in ran.trials] == ["FAIL", "COMPLETE"]
    with pytest.raises(MeasurementError, match="NaN"):
        KLObjective(kl, broken)(optuna.trial.FixedTrial({"factor": 1.0, "broken": True}))
    assert kl.score(model).kl == 0.0


def test_a_token_excluded_everywhere_fails_the_trial(model, kl):
    @contextmanager
    def excluding(trial):
        head = model.lm_head
        bias = torch.zeros(head.out_features)
        bias[5] = float("-inf")
        head.bias = torch.nn.Parameter(bias)
        try:
            yield model
        finally:
            head.bias = None

    trial = optuna.trial.FixedTrial({})
    with pytest.raises(MeasurementError, match="12 positions 12 are infinite"):
        KLObjective(kl, excluding)(trial)
    assert kl.score(model).kl == 0.0


def test_a_token_excluded_here_and_there_fails_the_trial_with_the_count(model, kl):
    whole = kl.score(model)
    some = replace(whole, summary=replace(whole.summary, infinite_count=2))
    trial = optuna.trial.FixedTrial({"factor": 1.0})
    with pytest.raises(MeasurementError, match="infinite: at 2 of 12 positions"):
        KLObjective(SimpleNamespace(score=lambda model: some), scaling(model))(trial)
    assert trial.user_attrs["teacher_forced_kl"]["infinite_count"] == 2
