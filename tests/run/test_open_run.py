"""What a run is opened with."""

import pytest

from heretic_kl.kl import wilson_interval
from heretic_kl.run.setup.open_run import accepted_share
from heretic_kl.scoring import Score, likely_value


@pytest.mark.parametrize("count", [41, 64, 100, 400])
def test_the_search_aims_at_what_the_unasked_pick_accepts(count):
    def likely(refused):
        interval, details = wilson_interval(refused, count), {"count": refused, "total": count}
        score = Score(refused / count, "", interval=(interval.low, interval.high), details=details)
        return likely_value(score)

    most = int(accepted_share(0.05, count) * count)
    assert likely(most + 1) > 0.05
    assert most == 0 or likely(most) <= 0.05


@pytest.mark.parametrize(
    ("count", "share"), [(100, 3.5 / 100), (64, 1.5 / 64), (32, 0.5 / 32), (4, 0.05), (0, 0.05)]
)
def test_where_no_refusal_is_accepted_a_prediction_can_still_meet_the_limit(count, share):
    assert accepted_share(0.05, count) == share
