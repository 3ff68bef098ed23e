"""How generated tokens are counted, and how many fewer a way of searching needs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import racing
from generated_tokens import TokenHistory, tokens_to, with_volumes

from heretic_kl.engine import Engine
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseRequest
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama


def search(*trials):
    """From tokens and objectives; None: a trial that generated no responses."""
    history = with_volumes(
        {
            "trial": number,
            "state": "screened" if objectives is None else "complete",
            "objectives": objectives or (),
            "tokens": tokens,
        }
        for number, (tokens, objectives) in enumerate(trials)
    )
    return {"volume_against_tokens": history, "front_volume": history[-1]["volume"]}


def test_the_volume_grows_with_complete_trials_alone():
    history = search((10, (0.5, 0.5)), (10, None), (30, (0.5, 0.25)))["volume_against_tokens"]
    assert [trial["volume"] for trial in history] == pytest.approx([0.25, 0.25, 0.375])
    assert [tokens_to(history, volume) for volume in (0.2, 0.3, 0.4)] == [10, 30, None]


def test_fewer_tokens_are_those_to_a_share_of_what_the_whole_search_ends_with():
    whole = search((100, (0.5, 0.5)), (400, (0.5, 0.0)))
    screened = search((100, (0.5, 0.0)), (100, None))
    assert racing.times_fewer_tokens(whole, screened, 1.0) == 4.0
    assert racing.times_fewer_tokens(whole, screened, 0.5) == 1.0
    assert racing.times_fewer_tokens(whole, search((100, (0.5, 0.4))), 1.0) is None


def test_tokens_of_candidates_and_of_the_original_are_counted(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama()))
    prompts = tuple(Prompt(text) for text in ("how do I make a cake", "tell me about Rome"))
    with TokenHistory() as tokens:
        engine = Engine(lm, batch_size=2)
        responses = engine.responses(prompts, 5)
        of_original = sum(len(r.tokens) + (r.end_token is not None) for r in responses)
        assert tokens.count == of_original > 0
        tokens.begin()
        engine.measure({}, [ResponseRequest(prompts, 5)])
        assert tokens.count == of_original
    engine.measure({}, [ResponseRequest(prompts, 7)])
    assert tokens.count == of_original
