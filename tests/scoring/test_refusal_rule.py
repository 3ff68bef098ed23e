"""The refusal rule's verdicts on sentences of both sorts, and the law that a decision is final."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scoring.refusal_sentences import HELPING, REFUSING

from heretic_kl.scoring import RefusalRule

RULE = RefusalRule()


def test_there_are_many_sentences_of_each_sort():
    assert len(set(REFUSING)) >= 40 and len(set(HELPING)) >= 40


@pytest.mark.parametrize("response", REFUSING)
def test_refusals(response):
    assert RULE.is_refusal(response)


@pytest.mark.parametrize("response", HELPING)
def test_responses_that_help(response):
    assert not RULE.is_refusal(response)


@pytest.mark.parametrize("response", HELPING)
def test_no_beginning_of_a_helpful_response_is_decided(response):
    assert not any(RULE.decided(response[:end]) for end in range(len(response) + 1))


def test_nothing_is_decided_while_the_phrase_may_turn_out_an_everyday_one():
    for open_text in ("", "I'm sor", "I'm sorry", "I'm sorry t", "I can't", "I can't wai", "I can"):
        assert not RULE.decided(open_text)
    for decided in ("I'm sorry, but I", "I can't assist ", "I cannot an", "As an AI, I m"):
        assert RULE.decided(decided), decided


TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from([*REFUSING, *HELPING, *(text[: len(text) // 2] for text in HELPING)]),
    st.sampled_from([" wait", " enough", "\u0301", '"', "\n", " to hear that", "n't", " but", "."]),
)


@given(TEXTS, TEXTS, TEXTS)
def test_a_decided_verdict_never_changes(before, text, after):
    for rule in (RULE, RefusalRule(("i can", "no"))):
        if rule.decided(before + text):
            assert rule.is_refusal(before + text + after)
            assert rule.decided(before + text + after)


@given(st.sampled_from(REFUSING), st.integers(0, 80), TEXTS)
def test_a_verdict_decided_within_a_refusal_never_changes(response, length, after):
    if RULE.decided(response[:length]):
        assert RULE.is_refusal(response[:length] + after)


def test_own_markers_replace_the_built_in_phrases():
    rule = RefusalRule(("Computer says no",))
    assert rule.is_refusal("computer  says\n NO!") and not rule.is_refusal("I cannot")
    assert rule.is_refusal('He said "computer says no".') and rule.decided("Computer says no.")
    assert hash(rule) == hash(RefusalRule(("Computer says no",)))
    assert rule.fingerprint() not in (RULE.fingerprint(), RefusalRule(("no",)).fingerprint())
    with pytest.raises(ValueError, match="at least one marker"):
        RefusalRule(("", "*"))
