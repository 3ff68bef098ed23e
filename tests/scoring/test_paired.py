"""Values of single prompts: kept with a score, read back, compared."""

import json

import pytest

from heretic_kl.scoring import Score, paired_difference, paired_scores
from heretic_kl.search import Screened
from heretic_kl.search.records import (
    SCORES,
    outcome_attributes,
    scores_from_json,
    scores_to_json,
)

VALUES = (1 / 3, 0.02, 0.25)


def score(*values):
    return Score(0.1, "0.1", per_prompt=values or None)


def test_a_score_minus_itself_is_zero_and_the_sign_turns_with_the_order():
    first, second = score(*VALUES), score(0.1, 0.1, 0.1)
    same = paired_scores(first, first)
    assert same.mean == 0 and same.interval == (0, 0) and not same.distinguishable
    there, back = paired_scores(first, second), paired_scores(second, first)
    assert there.mean == pytest.approx(-back.mean) == pytest.approx(sum(VALUES) / 3 - 0.1)
    assert there == paired_difference(VALUES, (0.1, 0.1, 0.1))


@pytest.mark.parametrize("other", [score(), score(0.1), score(*VALUES, 0.1)])
def test_other_prompts_or_none_are_no_pairs(other):
    assert paired_scores(score(*VALUES), other) is None
    assert paired_scores(other, score(*VALUES)) is None


def test_values_are_stored_briefly_and_scores_of_older_studies_are_read():
    text = scores_to_json({"kl": score(*VALUES), "old": score()})
    assert "0.3333333," in text
    read = scores_from_json(text)
    assert read["kl"].per_prompt == pytest.approx(VALUES, rel=1e-6)
    assert read["old"] == score() and "per_prompt" not in json.loads(text)["old"]


@pytest.mark.parametrize("promoted", [True, False])
def test_a_trial_that_no_front_can_hold_keeps_no_values(promoted):
    outcome = Screened({"kl": score(*VALUES)}, {"refusals": 0.5}, promoted)
    stored = scores_from_json(outcome_attributes(outcome)[SCORES])
    assert (stored["kl"].per_prompt is not None) is promoted
