"""Phrases per 100 words: what counts as one, and what silence is worth."""

import pytest

from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseResult
from heretic_kl.scoring import build_scorer
from heretic_kl.testing import ScorerContract, fake_context


class TestKeywordRate(ScorerContract):
    use = "keyword_rate"
    settings = {"phrases": ["flour", "sorry"]}


class TestKeywordRateOfOtherPrompts(ScorerContract):
    use = "keyword_rate"
    settings = {"prompts": "harmless", "max_response_tokens": 5}


def rates(*texts, phrases, role="minimize"):
    scorer = build_scorer("rate", "keyword_rate", {"phrases": phrases})
    prompts = tuple(Prompt(f"What about {number}?") for number in range(len(texts)))
    scorer.prepare(fake_context(prompts_by_kind={"harmful": prompts}, role=role))
    return scorer.per_prompt([ResponseResult(texts)]), scorer.score([ResponseResult(texts)])


def test_phrases_count_where_a_word_begins_whatever_their_case_and_quotes():
    text = "As an AI, I don\u2019t know. As  an\nai I say no; has an AI? Last an aim."
    (rate,), _ = rates(text, phrases=["as an ai", "don't"])
    assert rate == pytest.approx(100 * 3 / len(text.split()))


def test_an_empty_response_is_no_success():
    per_prompt, score = rates("flour " * 4 + "water", "", "water", phrases=["flour"])
    assert per_prompt == pytest.approx([80, 100, 0])
    assert score.value == pytest.approx(60) and score.details["with_phrases"] == 2
    assert score.interval[0] <= 60 <= score.interval[1] and "per 100 words" in score.text


@pytest.mark.parametrize(("role", "rate"), [("minimize", 100), ("monitor", 100), ("maximize", 0)])
def test_a_degenerate_response_is_no_success_whatever_the_role(role, rate):
    texts = ("", "water and then " * 20, "не знаю", "...")
    per_prompt, _ = rates(*texts, phrases=["water"], role=role)
    assert per_prompt == [rate] * 4


def test_a_longer_phrase_counts_once():
    (rate,), _ = rates("sorry but no", phrases=["sorry", "sorry but"])
    assert rate == pytest.approx(100 / 3)
