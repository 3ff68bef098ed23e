"""Intervals around counts and means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heretic_kl.kl import bootstrap_interval, wilson_interval
from heretic_kl.kl.intervals import sorted_quantile, standard_error

laws = settings(max_examples=100, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(successes, n, low, high):
    found = wilson_interval(successes, n)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


@laws
@given(n=st.integers(1, 500), data=st.data(), level=st.floats(0.5, 0.999))
def test_wilson_holds_the_share_and_mirrors(n, data, level):
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n, level)
    assert 0.0 <= low <= successes / n <= high <= 1.0
    mirrored = wilson_interval(n - successes, n, level)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-12)
    wider = wilson_interval(successes, n, 0.9995)
    assert wider.low <= low and high <= wider.high


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for successes, n in ((-1, 5), (6, 5), (0, -1)):
        with pytest.raises(ValueError, match="successes must be in"):
            wilson_interval(successes, n)
    with pytest.raises(ValueError, match="level"):
        wilson_interval(1, 2, level=1.0)


def test_bootstrap_is_near_the_normal_interval_and_ignores_order():
    values = torch.randn(400, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = bootstrap_interval(values)
    error = standard_error(values)
    assert found is not None and error is not None
    mean = float(values.mean())
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
    assert bootstrap_interval(values.flip(0)) == found
    assert bootstrap_interval(values, seed=1) != found
    ninety = bootstrap_interval(values, level=0.9)
    assert ninety is not None and found.low < ninety.low < ninety.high < found.high


def test_one_value_has_no_error():
    assert bootstrap_interval(torch.ones(1)) is None and standard_error(torch.ones(1)) is None
    assert bootstrap_interval(torch.ones(2)) == (1.0, 1.0) and standard_error(torch.ones(2)) == 0.0
    with pytest.raises(ValueError, match="draws must be at least 1"):
        bootstrap_interval(torch.ones(3), draws=0)


@laws
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), level=st.floats(0, 1))
def test_quantiles_agree_with_torch(values, level):
    ordered = torch.tensor(values, dtype=torch.float64).sort().values
    assert sorted_quantile(ordered, level) == pytest.approx(
        float(ordered.quantile(level)), rel=1e-9, abs=1e-6
    )
