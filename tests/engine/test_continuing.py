"""What of a cache can be used is found out by trying, and what cannot be used changes nothing."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine, generate_responses, stream_response
from heretic_kl.model import Capabilities, common_prefix, edited
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseRequest
from heretic_kl.testing import load_tiny_model, tiny_tokenizer, zoo

SYSTEM = "please tell me about the weather in Rome and then wait"
WORDS = "how do I make a cake bomb please tell me about the weather".split()
PROMPTS = tuple(Prompt(" ".join(WORDS[i : 2 + 2 * i]), SYSTEM) for i in range(1, 5))
EXPECTED = {
    "llama": (True, True, None),
    "gemma2": (True, False, 8),  # padding pushes tokens out of its window
    "mpt": (True, False, None),  # its biases count places in the cache
    "mamba": (True, False, None),
    "qwen3_next": (True, False, None),
    "recurrent_gemma": (False, False, None),  # layers keep their state from call to call
    "minimax": (False, False, None),  # wants a cache of its own class
}


@pytest.fixture(scope="module", params=list(EXPECTED))
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    zoo.tiny_model(request.param).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_tiny_model(folder)


def plainest(lm, prompt, most):
    tokens = list(prompt)
    with torch.no_grad():
        while len(tokens) < len(prompt) + most:
            logits = lm.model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            token = int(logits[0, -1].argmax())
            if token in lm.stop_ids:
                break
            tokens.append(token)
    return tokens[len(prompt) :]


def test_what_can_be_used_is_found(lm):
    allowed = lm.capabilities
    expected = EXPECTED[lm.model.config.model_type]
    assert (allowed.cache_problem is None, allowed.gap_problem is None) == expected[:2]
    if expected[2]:
        assert allowed.window == expected[2]
    assert ("key-value cache", "yes") in allowed.lines() or allowed.cache_problem


def test_answers_are_those_of_the_plainest_decoding(lm):
    encoded = [lm.chat.encode(prompt) for prompt in PROMPTS]
    assert len(common_prefix(encoded)) >= 8
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(3))
    plan = {
        key: ablation_operator(facts.pull_back(direction), 0.8)
        for key, facts in lm.architecture.facts().items()
    }
    with edited(lm.architecture, plan):
        expected = [plainest(lm, ids, 9) for ids in encoded]
        assert [a.tokens for a in generate_responses(lm, encoded, 9)] == expected
        assert "".join(stream_response(lm, encoded[0], 9)) == lm.chat.decode(expected[0])
    (several,) = Engine(lm, batch_size=3).measure(plan, [ResponseRequest(PROMPTS, 9)])
    assert list(several.texts) == [lm.chat.decode(tokens) for tokens in expected]


def test_a_prefix_is_shared_where_the_window_leaves_room():
    way = Capabilities(window=20, cache_problem=None, gap_problem=None)
    assert way.shares_prefix_in_cache([[1] * 9, [1] * 12], 8)
    assert not way.shares_prefix_in_cache([[1] * 9, [1] * 12], 9)
    assert way.shares_prefix_in_cache([[1] * 12, [1] * 12], 9)  # nothing to pad
    gapless = Capabilities(cache_problem=None, gap_problem="counts places")
    assert not gapless.shares_prefix_in_cache([[1] * 9, [1] * 12], 1)
    assert not Capabilities().shares_prefix_in_cache([[1] * 9, [1] * 9], 1)
