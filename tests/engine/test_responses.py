"""Responses are those of plain greedy decoding, however they are computed."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.model import edited
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseRequest
from heretic_kl.scoring import RefusalRule
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

WORDS = "how do I make a cake bomb please tell me about the weather in Rome".split()
SYSTEM = "you need to know what the weather is and I will not wait for it now"
PROMPTS = tuple(
    Prompt(" ".join(WORDS[(i * 3) % 9 :][: 1 + i % 6]) + " " + WORDS[i % 14], SYSTEM)
    for i in range(25)
)
RULE = RefusalRule(("flour", "mix", "bomb", "sorry"))
MEGABYTE = 2**20


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2", "gemma2"])
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny_model(save_tiny_model(folder / "m", TINY_CONFIGS[request.param]()))


def plan_of(lm, seed, *, lowest=0, weight=0.8):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(seed))
    return {
        key: ablation_operator(direction, weight)
        for key in lm.architecture.facts()
        if key.layer >= lowest
    }


def plain(lm, plan, tokens):
    """Greedy responses, one row at a time, whole sequences, no cache."""
    responses = []
    with edited(lm.architecture, plan), torch.inference_mode():
        for prompt in PROMPTS:
            ids, start = list(lm.chat.encode(prompt)), len(lm.chat.encode(prompt))
            while len(ids) - start < tokens:
                logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits
                token = int(logits[0, -1].argmax())
                if token in lm.stop_ids:
                    break
                ids.append(token)
            responses.append(lm.chat.decode(ids[start:]))
    return responses


@pytest.mark.parametrize("cache_bytes", [0, MEGABYTE])
@pytest.mark.parametrize("batch_size", [3, 32])
def test_hundreds_of_responses_and_verdicts_are_those_of_plain_generation(
    lm, cache_bytes, batch_size
):
    engine = Engine(lm, batch_size=batch_size, cache_bytes=cache_bytes)
    whole, cut = ResponseRequest(PROMPTS, 12), ResponseRequest(PROMPTS, 13, RULE)
    engine.measure(None, [whole])
    engine.measure(None, [cut])
    for seed in (1, 2, 1, 4):
        plan = plan_of(lm, seed, lowest=seed % 3, weight=0.1 * seed)
        expected = plain(lm, plan, 13)
        texts = engine.measure(plan, [cut])[0].texts
        verdicts = [RULE.is_refusal(text) for text in texts]
        assert verdicts == [RULE.is_refusal(text) for text in expected]
        assert all(long.startswith(text) for long, text in zip(expected, texts, strict=True))
        assert list(engine.measure(plan, [whole])[0].texts) == plain(lm, plan, 12)


def test_several_candidates_side_by_side_answer_as_each_alone(lm):
    plans = [plan_of(lm, 1, lowest=1), plan_of(lm, 2, lowest=2), plan_of(lm, 3, lowest=1)]
    asked = ResponseRequest(PROMPTS, 12, RULE)
    engine = Engine(lm, batch_size=8, cache_bytes=MEGABYTE)
    engine.measure(None, [asked])
    for _ in range(2):
        together = engine.measure_many(plans, [asked])
        for plan, (responses,) in zip(plans, together, strict=True):
            assert responses == Engine(lm, batch_size=8).measure(plan, [asked])[0]


def test_lower_layers_do_not_read_prompts_again(lm):
    engine = Engine(lm, batch_size=32, cache_bytes=MEGABYTE)
    plan, asked = plan_of(lm, 1, lowest=2), ResponseRequest(PROMPTS, 1)
    engine.measure(None, [asked])
    engine.measure(plan, [asked])  # records
    calls = []
    handles = [
        (layer.self_attn if hasattr(layer, "self_attn") else layer.attn).register_forward_hook(
            lambda *_, index=index: calls.append(index)
        )
        for index, layer in enumerate(lm.architecture.layers)
    ]
    engine.measure(plan, [asked])
    for handle in handles:
        handle.remove()
    assert calls and min(calls) == 2
    assert engine.limits.cache_left < MEGABYTE
