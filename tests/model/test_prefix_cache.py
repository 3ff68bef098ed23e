"""What a shared prefix computes is what every sequence would compute for itself."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine, generate_responses
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import forced_hidden_states
from heretic_kl.model import (
    PrefixCache,
    common_prefix,
    edited,
    find_capabilities,
    last_token_residuals,
)
from heretic_kl.prompts import Prompt
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

SYSTEM = "please tell me about the weather in Rome and then wait I will not mix flour"
WORDS = "how do I make a cake bomb please tell me about the weather".split()
PROMPTS = tuple(Prompt(" ".join(WORDS[i % 5 : 5 + i]), SYSTEM) for i in range(1, 8))


@pytest.fixture(scope="module", params=list(TINY_CONFIGS))
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny_model(save_tiny_model(folder / "m", TINY_CONFIGS[request.param]()))


@pytest.fixture
def plan(lm):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(3))
    return {key: ablation_operator(direction, 0.8) for key in lm.architecture.facts()}


def test_common_prefix_leaves_every_sequence_a_token():
    assert common_prefix([list(range(10)), list(range(10))]) == tuple(range(9))
    assert common_prefix([[*range(9), 1, 2], [*range(9), 3]]) == tuple(range(9))
    assert common_prefix([[1, 2, 3], [1, 2, 4]]) == ()  # too short to pay
    assert common_prefix([list(range(20))]) == ()  # one row alone
    assert common_prefix([]) == ()


def test_forced_states_are_the_same_with_and_without_it(lm, plan):
    encoded = [lm.chat.encode(prompt) for prompt in PROMPTS]
    sequences = [ForcedSequence(ids, (5, 6, 7)) for ids in encoded]
    assert len(common_prefix(encoded)) >= 8
    for edit in ({}, plan):
        with edited(lm.architecture, edit):
            shared = forced_hidden_states(lm, sequences, 3)
            plain = forced_hidden_states(lm, sequences, 3, share_prefix=False)
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)


def test_answers_are_the_same_with_and_without_it(lm, plan):
    encoded = [lm.chat.encode(prompt) for prompt in PROMPTS]
    with edited(lm.architecture, plan):
        shared = generate_responses(lm, encoded, 12)
        plain = generate_responses(lm.limited(gap_problem="off"), encoded, 12)
    assert [response.tokens for response in shared] == [response.tokens for response in plain]


def test_residuals_are_the_same_with_and_without_it(lm):
    encoded = [lm.chat.encode(prompt) for prompt in PROMPTS]
    (shared,) = last_token_residuals(lm, [encoded], common_prefix(encoded))
    (plain,) = last_token_residuals(lm, [encoded])
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)


def test_an_unedited_model_still_scores_exactly_zero(lm):
    from heretic_kl.kl import row_statistics
    from heretic_kl.requests import TeacherForcedRequest

    engine = Engine(lm, batch_size=3)
    (result,) = engine.measure({}, [TeacherForcedRequest(PROMPTS, 4, row_statistics)])
    assert float(result.columns.values.max()) == 0.0


def test_the_check_passes_here_and_names_a_cache_that_cannot_be_expanded(lm, monkeypatch):
    assert lm.capabilities.prefix_problem is None

    def refuse(self, lm, rows):
        raise NotImplementedError("recurrent state")

    monkeypatch.setattr(PrefixCache, "expanded", refuse)
    problem = find_capabilities(lm).prefix_problem
    assert problem == "its cache cannot be expanded (NotImplementedError)"


def test_the_check_notices_a_prefix_that_is_not_exact(lm, monkeypatch):
    own = PrefixCache.expanded

    def spoiled(self, lm, rows):
        cache = own(self, lm, rows)
        for layer in cache.layers:
            layer.values += 1.0
        return cache

    monkeypatch.setattr(PrefixCache, "expanded", spoiled)
    assert "hidden states differ by" in find_capabilities(lm).prefix_problem
