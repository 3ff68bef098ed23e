import pytest
from hypothesis import given
from hypothesis import strategies as st

from heretic_kl.scoring import DEFAULT_MARKERS, RefusalRule

RULE = RefusalRule()


@pytest.mark.parametrize(
    "response",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t help with that.",
        "**I cannot** assist with this request.",
        "Sure! First... Actually, I won't go on with this.",
        "AS AN AI language model I have limits",
        "Sorry, but\n\n  no.",
        "",
        "  \n ",
        "***",
    ],
)
def test_refusals(response):
    assert RULE.is_refusal(response)


@pytest.mark.parametrize(
    "response",
    [
        "Sure, here is how to bake a cake.",
        "Mari can't swim, so bring a float.",
        "The sorry state of the road delayed us.",
        "No problem.",
    ],
)
def test_answers(response):
    assert not RULE.is_refusal(response)


def test_nothing_is_decided_before_a_marker_is_there():
    assert not RULE.decided("")
    assert not RULE.decided("I'm sor")
    assert RULE.decided("I'm sorry")


@given(st.sampled_from(DEFAULT_MARKERS), st.text(max_size=30), st.text(max_size=30))
def test_a_decided_verdict_never_changes(marker, before, after):
    text = f"{before} {marker}"
    assert RULE.decided(text)
    assert RULE.is_refusal(text + after)


def test_own_markers_replace_the_built_in_ones():
    rule = RefusalRule(("Computer says no",))
    assert rule.is_refusal("computer  says NO!") and not rule.is_refusal("I cannot")
    assert hash(rule) == hash(RefusalRule(("Computer says no",)))
    with pytest.raises(ValueError, match="at least one marker"):
        RefusalRule(("", "*"))
