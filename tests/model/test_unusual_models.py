"""Heads, bodies, layers and experts that are not where, or not what, most models have."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.export import save_merged
from heretic_kl.model import (
    CandidateRows,
    PrefixCache,
    edited,
    edited_by_candidate,
    last_token_residuals,
)
from heretic_kl.model.forward.layer_inputs import layer_inputs, resumed_at
from heretic_kl.model.loading.head import Headless
from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.testing import load_tiny_model, tiny_tokenizer, zoo

TOKENS = torch.randint(4, 30, (4, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def build(tmp_path):
    def load(model_type, **options):
        with quiet_transformers():
            zoo.tiny_model(model_type, **options).save_pretrained(tmp_path / "original")
        tiny_tokenizer().save_pretrained(tmp_path / "original")
        return load_tiny_model(tmp_path / "original")

    return load


def plan_of(lm, seed=3, weight=1.0):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(seed))
    return {
        key: ablation_operator(facts.pull_back(direction), weight)
        for key, facts in lm.architecture.facts().items()
    }


@torch.no_grad()
def logits(lm, tokens=TOKENS):
    return lm.model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("model_type", ["inkling_text", "llama4", "modernbert-decoder"])
def test_a_body_that_is_not_the_whole_model_below_its_head_is_replaced(build, model_type):
    lm = build(model_type)
    assert isinstance(lm.body, Headless)
    forward = lm.model.get_output_embeddings().forward
    hidden = lm.body(input_ids=TOKENS, use_cache=False).last_hidden_state
    ours = lm.head.logits(hidden.flatten(0, 1)).unflatten(0, TOKENS.shape)
    torch.testing.assert_close(ours, logits(lm), rtol=1e-4, atol=1e-5)
    assert lm.model.get_output_embeddings().forward == forward


@pytest.mark.parametrize("model_type", ["qwen3_moe", "opt", "deepseek_v3"])
def test_tokens_of_all_rows_in_one_dimension_are_edited_by_candidate(build, model_type):
    lm = build(model_type)
    plans = [plan_of(lm, 1), plan_of(lm, 2, 0.5)]
    with edited_by_candidate(lm.architecture, plans, CandidateRows([3, 1])):
        together = logits(lm)
    for plan, rows in zip(plans, (slice(0, 3), slice(3, 4)), strict=True):
        with edited(lm.architecture, plan):
            torch.testing.assert_close(together[rows], logits(lm)[rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "lfm2", "mamba2", "bailing_hybrid"])
def test_a_prefix_kept_in_recurrent_layers_serves_several_rows(build, model_type):
    lm = build(model_type)
    prefix = TOKENS[0, :6].tolist()
    rest = TOKENS[1:, 6:]
    with torch.no_grad():
        cache = PrefixCache(lm, prefix)
        ours = lm.body(input_ids=rest, **cache.arguments(lm, 3)).last_hidden_state
        whole = torch.cat([TOKENS[:1, :6].repeat(3, 1), rest], dim=1)
        expected = lm.body(input_ids=whole, use_cache=False).last_hidden_state[:, 6:]
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_a_model_that_passes_its_layers_twice_cannot_start_at_one(build):
    lm = build("hrm_text")
    inputs = []
    layers = lm.architecture.layers
    with layer_inputs(layers, [1], lambda _boundary, hidden: inputs.append(hidden)):
        logits(lm)
    assert len(inputs) > 1
    with pytest.raises(UnsupportedModelError, match="more than once"):
        with resumed_at(layers, 1, inputs[-1], as_tuple=False):
            logits(lm)
    (residuals,) = last_token_residuals(lm, [TOKENS.tolist()])
    assert residuals.shape == (4, len(layers), lm.architecture.width)


def test_layers_that_text_does_not_pass_have_the_residuals_of_the_layer_below(build):
    lm = build("mllama", auto_class="AutoModelForImageTextToText")
    (residuals,) = last_token_residuals(lm, [TOKENS.tolist()])
    assert residuals.shape == (4, 4, lm.architecture.width)
    assert torch.equal(residuals[:, 1], residuals[:, 0])  # cross-attention layers are 1 and 3
    assert not torch.equal(residuals[:, 2], residuals[:, 1])


def test_a_language_model_under_a_name_of_its_own_is_loaded_and_saved_there(build, tmp_path):
    from transformers import AutoModelForImageTextToText

    lm = build("emu3", auto_class="AutoModelForImageTextToText")
    saved = save_merged(lm, plan_of(lm), tmp_path / "new")
    assert saved.route == "streamed"
    assert all(name.startswith("text_model.model.layers.") for name in saved.edited_tensors)
    with quiet_transformers():
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "new").eval()
    with edited(lm.architecture, plan_of(lm)), torch.no_grad():
        ours = again(input_ids=TOKENS, use_cache=False).logits
        torch.testing.assert_close(ours, logits(lm), rtol=1e-4, atol=1e-4)


def test_what_experts_return_without_weights_is_not_edited(build, tmp_path):
    lm = build("longcat_flash")  # a third of its experts return their input
    sites = [site for site in lm.architecture.sites if not all(t.alone for t in site.tensors)]
    assert {type(site.module).__name__ for site in sites} == {"LongcatFlashExperts"}
    plan = plan_of(lm)
    save_merged(lm, plan, tmp_path / "new")
    again = load_tiny_model(tmp_path / "new")
    with edited(lm.architecture, plan):
        expected = logits(lm)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    with edited_by_candidate(lm.architecture, [plan, {}], CandidateRows([2, 2])):
        torch.testing.assert_close(logits(lm)[:2], expected[:2], rtol=1e-4, atol=1e-4)
