"""Weights packed for the processor: the same products, faster."""

import copy
import pickle

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.kl import Head, row_statistics
from heretic_kl.kl.packing import packed
from heretic_kl.model import packed_bytes, with_packed_weights
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseRequest, TeacherForcedRequest
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

WORDS = "how do I make a cake bomb please tell me about the weather in Rome".split()
PROMPTS = tuple(Prompt(" ".join(WORDS[i % 5 : 5 + i])) for i in range(1, 9))
FORCED, ASKED = TeacherForcedRequest(PROMPTS, 5, row_statistics), ResponseRequest(PROMPTS, 12)
DTYPES = [d for d in (torch.float32, torch.bfloat16) if packed(torch.ones(8, 8, dtype=d))]
"""Those that this processor has a layout for: few have one for bfloat16."""

pytestmark = pytest.mark.skipif(packed(torch.ones(8, 8)) is None, reason="no packed layout here")


@pytest.fixture(params=["llama", "gpt2", "gemma2"])
def lm(request, tmp_path):
    return load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS[request.param]()))


@pytest.mark.parametrize("rows", [(1,), (3,), (40,), (2, 7)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_is_that_of_the_plain_weight(rows, dtype):
    weight, inputs = torch.randn(48, 33, dtype=dtype), torch.randn(*rows, 33, dtype=dtype)
    bias = torch.randn(48, dtype=dtype)
    expected = torch.nn.functional.linear(inputs, weight, bias)
    packed_weight = packed(weight)
    assert packed_weight.is_current(weight)
    torch.testing.assert_close(packed_weight.product(inputs, weight, bias), expected)


def test_other_dtypes_have_no_layout():
    assert packed(torch.ones(8, 8, dtype=torch.float64)) is None


def test_a_packed_model_measures_as_the_plain_one(lm):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(1))
    plan = {key: ablation_operator(direction, 0.7) for key in lm.architecture.facts()}
    forced, asked = Engine(lm, batch_size=3).measure(plan, [FORCED, ASKED])
    ours = with_packed_weights(lm)
    engine = Engine(ours, batch_size=3, cache_bytes=2**20)
    packed_forced, packed_asked = engine.measure(plan, [FORCED, ASKED])
    torch.testing.assert_close(
        packed_forced.columns.values, forced.columns.values, rtol=1e-3, atol=1e-9
    )
    assert packed_asked.texts == asked.texts
    (unedited,) = engine.measure(None, [FORCED])
    assert not unedited.columns.values.any()


def test_a_weight_that_is_changed_counts_at_once(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]()))
    site = lm.architecture.sites[0].module
    inputs = torch.randn(3, site.in_features)
    before = site(inputs)
    with_packed_weights(lm)
    assert "forward" in vars(site)
    torch.testing.assert_close(site(inputs), before)
    original = site.weight.data
    site.weight.data = torch.zeros_like(original)
    assert not site(inputs).any()
    site.weight.data = original
    torch.testing.assert_close(site(inputs), before)
    with torch.no_grad():
        site.weight.mul_(2)
    torch.testing.assert_close(site(inputs), 2 * before)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],  # noqa: S301 (our own bytes)
    ids=["deepcopy", "pickle"],
)
@torch.no_grad()
def test_a_copy_of_a_packed_model_computes_with_weights_of_its_own(tmp_path, copied):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]()))
    tokens = torch.randint(4, 30, (2, 7), generator=torch.Generator().manual_seed(0))

    def logits(model):
        return model(input_ids=tokens, use_cache=False).logits

    def halve_first_site(model):
        model.get_submodule(lm.architecture.sites[0].key.path).weight.mul_(0.5)
        return model

    before, expected = logits(lm.model), logits(halve_first_site(copied(lm.model)))
    assert not torch.allclose(before, expected, atol=1e-3)
    with_packed_weights(lm)
    model = copied(lm.model)
    torch.testing.assert_close(logits(model), before)
    torch.testing.assert_close(logits(halve_first_site(model)), expected)
    torch.testing.assert_close(logits(lm.model), before)


@torch.no_grad()
def test_a_packed_head_follows_its_weight_and_a_copy_of_it_its_own():
    head = Head(torch.randn(50, 8)).with_packed_weight()
    hidden = torch.randn(3, 8)
    before = head.logits(hidden)
    duplicate = copy.deepcopy(head)
    duplicate.weight.mul_(3)
    torch.testing.assert_close(duplicate.logits(hidden), 3 * before)
    torch.testing.assert_close(head.logits(hidden), before)
    head.weight.mul_(2)
    torch.testing.assert_close(head.logits(hidden), 2 * before)


def test_a_forward_that_another_library_put_there_stays(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]()))
    site = lm.architecture.sites[0].module
    site.forward = hooked = lambda rows: torch.nn.functional.linear(rows, site.weight)
    with_packed_weights(lm)
    assert site.forward is hooked


def test_gradients_pass_as_through_the_plain_layer(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]()))
    site = lm.architecture.sites[0].module
    with_packed_weights(lm)
    inputs = torch.randn(3, site.in_features, requires_grad=True)
    site(inputs).sum().backward()
    torch.testing.assert_close(inputs.grad, site.weight.sum(0).expand(3, -1))


def test_what_copies_take_is_known_beforehand(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]()))
    layers = sum(
        module.weight.numel() * 4
        for name, module in lm.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert packed_bytes(lm) == layers + lm.head.weight.numel() * 4
