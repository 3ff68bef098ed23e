"""Heads found by running models, on weights scaled up until scale, bias and soft cap matter."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.loading.head import Headless, find_body_and_head
from heretic_kl.model.transformers_logging import quiet_transformers
from heretic_kl.testing import TINY_CONFIGS, zoo

LARGEST_LOGIT = 40.0
TOKENS = torch.randint(4, 30, (2, 9), generator=torch.Generator().manual_seed(0))
SETTINGS = {
    "cohere": {"logit_scale": 0.0625},
    "falcon_h1": {"lm_head_multiplier": 0.25},
    "granite": {"logits_scaling": 6.0},
    "hyperclovax": {"logits_scaling": 0.3},
    "recurrent_gemma": {"logits_soft_cap": 25.0},
    "xlstm": {"output_logit_soft_cap": 20.0},
}
"""Model type -> what its config says about the logits, under a name of its own."""
TYPES = [*SETTINGS, "dory", "gemma2", "gptj", "inkling_text", "llama4", "phi"]
SCALES = {"cohere": 0.0625, "falcon_h1": 0.25, "granite": 1 / 6, "hyperclovax": 0.3}
SOFT_CAPS = {"recurrent_gemma": 25.0, "xlstm": 20.0, "gemma2": 30.0}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def build(config):
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def scaled_up(model):
    """The model, its head's weight scaled until the head's module gives logits up to 40."""
    head, outputs = model.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    model(input_ids=TOKENS, use_cache=False)
    handle.remove()
    factor = LARGEST_LOGIT / float(outputs[0].abs().max())
    head.weight = nn.Parameter(head.weight * factor, requires_grad=False)  # no longer tied
    return model


def assert_gives_the_models_own_logits(model, tolerance=1e-4):
    body, head = find_body_and_head(model)
    expected = model(input_ids=TOKENS, use_cache=False).logits
    hidden = body(input_ids=TOKENS, use_cache=False).last_hidden_state
    logits = head.logits(hidden.flatten(0, 1)).unflatten(0, TOKENS.shape)
    torch.testing.assert_close(logits, expected.float(), rtol=tolerance, atol=tolerance)
    return head


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_tiny_models(family):
    head = assert_gives_the_models_own_logits(scaled_up(build(TINY_CONFIGS[family]())))
    assert head.scale == 1.0
    assert head.softcap == SOFT_CAPS.get(family)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("enlarged", [True, False], ids=["logits up to 40", "small logits"])
def test_scale_and_soft_cap_are_found_whatever_their_name_in_the_config(model_type, enlarged):
    config = zoo.tiny_config(model_type)
    for name, value in SETTINGS.get(model_type, {}).items():
        assert hasattr(config, name)
        setattr(config, name, value)
    model = build(config)
    head = assert_gives_the_models_own_logits(scaled_up(model) if enlarged else model)
    assert head.scale == pytest.approx(SCALES.get(model_type, 1.0), rel=1e-5)
    expected = SOFT_CAPS.get(model_type)
    assert head.softcap == (None if expected is None else pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize("model_type", ["recurrent_gemma", "cohere", "gptj"])
def test_half_precision_finds_the_same_steps(model_type):
    model = scaled_up(zoo.tiny_model(model_type))
    exact = find_body_and_head(model)[1]
    head = assert_gives_the_models_own_logits(model.to(torch.bfloat16), tolerance=0.5)
    assert (head.scale, head.softcap) == (exact.scale, exact.softcap)
    assert (head.bias is None) == (exact.bias is None)


class ChangedLogits(nn.Module):
    """A tiny Llama with something done to its logits."""

    def __init__(self, change):
        super().__init__()
        self.inner = build(TINY_CONFIGS["llama"]())
        self.config, self.base_model = self.inner.config, self.inner.model
        self.change = change

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **arguments):
        output = self.inner(**arguments)
        output.logits = self.change(output.logits)
        return output


def test_a_scale_and_bias_of_each_token_behind_the_head_are_found():
    vocabulary = TINY_CONFIGS["llama"]().vocab_size
    scale, bias = torch.linspace(0.5, 2.0, vocabulary), torch.linspace(-3.0, 3.0, vocabulary)
    head = assert_gives_the_models_own_logits(
        ChangedLogits(lambda logits: 20 * torch.tanh((scale * logits + bias) / 20))
    )
    assert head.softcap == pytest.approx(20.0)
    torch.testing.assert_close(head.bias, bias, rtol=1e-4, atol=1e-5)


def test_padding_columns_are_dropped():
    head = assert_gives_the_models_own_logits(ChangedLogits(lambda logits: logits[..., :-3]))
    assert head.vocabulary == TINY_CONFIGS["llama"]().vocab_size - 3


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.clamp(max=35.0),
        lambda logits: torch.log_softmax(logits, dim=-1),
        lambda logits: logits + 1e-3 * logits.square(),
    ],
)
def test_other_steps_behind_the_head_are_rejected_though_logits_are_small(change):
    with pytest.raises(UnsupportedModelError, match="other steps than a scale, a bias and a soft"):
        find_body_and_head(ChangedLogits(change))


def test_half_precision_does_not_hide_a_small_step():
    changed = ChangedLogits(lambda logits: logits + 5e-5 * logits.square())
    changed.to(torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="other steps than a scale"):
        find_body_and_head(changed)


def test_half_precision_logits_that_the_model_rounds_are_accepted():
    changed = ChangedLogits(lambda logits: logits.to(torch.bfloat16) * 0.3)
    changed.to(torch.bfloat16)
    assert find_body_and_head(changed)[1].scale == pytest.approx(0.3, rel=0.01)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_on_the_head_counts():
    from peft import LoraConfig, get_peft_model

    model = build(TINY_CONFIGS["llama"]())
    options = {"r": 2, "target_modules": ["lm_head"], "init_lora_weights": False}
    with quiet_transformers():
        adapted = get_peft_model(model, LoraConfig(**options)).get_base_model().eval()
    head = assert_gives_the_models_own_logits(adapted.requires_grad_(False))
    assert not torch.equal(head.weight, adapted.get_output_embeddings().weight)


def test_a_head_that_is_not_linear_is_rejected():
    model = build(TINY_CONFIGS["llama"]())
    head = model.get_output_embeddings()
    head.forward = lambda hidden: nn.functional.linear(hidden, head.weight).square()
    with pytest.raises(UnsupportedModelError, match="not linear"):
        find_body_and_head(model)


def test_a_body_that_does_less_than_the_model_below_its_head_is_replaced():
    assert isinstance(find_body_and_head(zoo.tiny_model("inkling_text"))[0], Headless)
    assert not isinstance(find_body_and_head(zoo.tiny_model("llama"))[0], Headless)
