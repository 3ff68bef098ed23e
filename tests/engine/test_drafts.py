"""Guessed tokens save passes and change no answer."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.engine.generation.cache_check import continuing
from heretic_kl.engine.generation.decoding import Decoding, guessing_problem
from heretic_kl.engine.generation.drafts import LONGEST_DRAFT, DraftLength, Drafts
from heretic_kl.engine.generation.generate import generate_responses
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
    """Greedy answers, one row at a time, whole sequences, no cache, no guesses."""
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


class Counted:
    """Counts passes of the model over a batch."""

    def __init__(self, monkeypatch):
        self.passes = self.guessed = 0
        own = Decoding._forward

        def forward(state, tokens, positions):
            self.passes += 1
            self.guessed += state._guessed
            own(state, tokens, positions)

        monkeypatch.setattr(Decoding, "_forward", forward)


@pytest.mark.parametrize("cache_bytes", [0, MEGABYTE])
@pytest.mark.parametrize("batch_size", [3, 32])
def test_hundreds_of_answers_and_verdicts_are_those_of_plain_generation(
    lm, cache_bytes, batch_size
):
    """Four edits of 25 prompts, one of them twice, so that guesses are there."""
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


def test_a_known_answer_takes_few_passes(lm, monkeypatch):
    engine = Engine(lm, batch_size=32)
    asked = ResponseRequest(PROMPTS, 24)
    counted = Counted(monkeypatch)
    (original,) = engine.measure(None, [asked])
    plain_passes, counted.passes = counted.passes, 0
    (same,) = engine.measure({}, [asked])
    assert same == original
    if guessing_problem(lm, continuing(lm)) is None:
        assert counted.passes <= plain_passes / 2
    else:
        assert counted.passes == plain_passes and counted.guessed == 0


def test_bad_guesses_change_nothing_but_time(lm, monkeypatch):
    class Wrong:
        def first(self, row):
            return [7] * (row % 4)

        def following(self, row, response, rows):
            return [len(response) % 5 + 4] * (row % 3)

        def checked(self, right, wrong):
            assert right >= 0 and wrong >= 0

    if guessing_problem(lm, continuing(lm)) is not None:
        pytest.skip("this model's cache cannot take back")
    sequences = [lm.chat.encode(prompt) for prompt in PROMPTS]
    for share_prefix in (True, False):
        options = {"share_prefix": share_prefix}
        expected = generate_responses(lm, sequences, 15, [RULE], **options)
        assert generate_responses(lm, sequences, 15, [RULE], guesses=Wrong(), **options) == expected


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
    assert engine._bytes_left() < MEGABYTE


def test_models_that_cannot_take_back_say_so_and_answer_alike(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "m", TINY_CONFIGS["gemma2"]()))
    notes = []
    engine = Engine(lm, batch_size=8, notify=notes.append)
    asked = ResponseRequest(PROMPTS, 6)
    (responses,) = engine.measure(plan_of(lm, 1), [asked])
    assert list(responses.texts) == plain(lm, plan_of(lm, 1), 6)
    reason = "its cache does not keep all keys and values"
    assert notes == [f"answers are generated token by token: {reason}"]


def test_guesses_come_from_the_latest_answer_that_began_alike():
    drafts = Drafts([(1, 2, 3, 4, 5, 6), ()])
    assert drafts.guess(0, [1, 2], 2) == (3, 4)
    drafts.add(0, [1, 2, 9, 9, 7])
    assert drafts.guess(0, [1, 2], 2) == (9, 9)
    assert drafts.guess(0, [8, 8, 2, 3, 4], 9) == (5, 6)
    assert drafts.guess(0, [8, 8, 3, 4], 9) == ()
    assert drafts.guess(0, [1, 2, 3, 4, 5, 6], 3) == ()
    assert drafts.guess(1, [1], 3) == () == drafts.guess(0, [1], 0)


def test_how_much_is_guessed_follows_what_was_right():
    length = DraftLength("cpu")
    assert length.best(40) < length.best(8) <= length.best(1)
    length.learn(right=300, wrong=1)
    assert length.best(1) == LONGEST_DRAFT
    length.learn(right=0, wrong=3000)
    assert length.best(40) == 0
    for _ in range(15):
        length.fade()
    assert length.best(8) == DraftLength("cpu").best(8)
