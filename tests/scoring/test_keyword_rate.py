"""Phrases per 100 words: what counts as one, and what silence is worth."""

import pytest

from heretic_kl.requests import ResponseResult
from heretic_kl.scoring import build_scorer
from heretic_kl.testing import ScorerContract, fake_context


class TestKeywordRate(ScorerContract):
    use = "keyword_rate"
    settings = {"phrases": ["flour", "sorry"]}


class TestKeywordRateOfOtherPrompts(ScorerContract):
    use = "keyword_rate"
    settings = {"prompts": "harmless", "max_response_tokens": 5}


def rates(*texts, phrases):
    scorer = build_scorer("rate", "keyword_rate", {"phrases": phrases})
    scorer.prepare(fake_context())
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


def test_a_longer_phrase_counts_once():
    (rate,), _ = rates("sorry but no", phrases=["sorry", "sorry but"])
    assert rate == pytest.approx(100 / 3)
