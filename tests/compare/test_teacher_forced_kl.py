"""The stand-alone measurement, on tiny random models."""

import pytest
import torch

from heretic_kl.compare import TeacherForcedKL
from heretic_kl.testing import save_tiny_model, tiny_llama, tiny_tokenizer

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("a") / "original", tiny_llama())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("b") / "other", tiny_llama(), seed=1)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_model_against_itself_is_exactly_zero(original):
    kl = TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=4)
    summary = kl.score(original).summary
    assert summary.mean == 0.0 and summary.mean_probability_change == 0.0
    assert summary.top1_agreement == 1.0 and summary.below_noise_floor
    assert all(place.mean == 0.0 for place in summary.profile)


def test_objects_and_paths_measure_alike_and_models_stay_as_they_were(original, other):
    by_path = TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=4)
    candidate = load(other).train()
    by_object = TeacherForcedKL(load(original), tiny_tokenizer(), prompts=PROMPTS, kl_tokens=4)
    assert by_object.score(candidate).kl == by_path.score(other).kl > 0.0
    assert candidate.training and all(p.requires_grad for p in candidate.parameters())


def test_a_reference_survives_changes_of_its_model(original):
    model = load(original)
    kl = TeacherForcedKL(model, tiny_tokenizer(), prompts=PROMPTS, kl_tokens=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert kl.score(model).kl > 0.0
    assert kl.score(original).kl == 0.0
