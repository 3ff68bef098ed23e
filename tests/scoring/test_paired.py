"""The tests that racing at a stated error rate rests on: the quantiles, the looks, the error."""

import math
import random

import pytest
import torch

from heretic_kl.scoring.paired import LOOKS, Standing, above_zero, look_is_due, student_tail
from heretic_kl.scoring.paired import worse_than as compared
from heretic_kl.scoring.scorer import PerPrompt

ERROR = 0.1


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 23, 50, 95])
@pytest.mark.parametrize("t", [0.3, 1.7, 4.0])
def test_student_tail_is_the_integral_of_the_density(freedom, t):
    # P(0 < T < t): the density is smooth, so a fine grid is an oracle.
    x = torch.linspace(0.0, t, 200_001, dtype=torch.float64)
    log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    inside = float(torch.trapezoid(density, x)) * math.exp(log) / math.sqrt(freedom * math.pi)
    assert student_tail(t, freedom) == pytest.approx(0.5 - inside, abs=1e-9)
    assert student_tail(-t, freedom) == pytest.approx(0.5 + inside, abs=1e-9)


@pytest.mark.parametrize("total", [9, 10, 33, 64, 100])
@pytest.mark.parametrize("portion", [1, 3, 8])
def test_looks_are_few_and_none_is_taken_once_all_is_there(total, portion):
    taken, last = 0, 0
    for measured in range(portion, total + 1, portion):
        if look_is_due(measured, total, last):
            assert 8 <= measured < total
            taken, last = taken + 1, measured
    assert taken <= LOOKS


def test_the_error_of_a_mean_over_all_prompts_is_nothing_and_no_spread_tells_nothing():
    assert above_zero([1.0, 2.0, 4.0], 3).standard_error == 0.0
    assert above_zero([1.0] * 10, 40).tail == 1.0
    assert above_zero([1.0, 2.0] * 10, 40).tail < 1e-9
    assert above_zero([-1.0, -2.0] * 10, 40).tail > 1 - 1e-9


@pytest.mark.parametrize("maximize", [False, True])
def test_below_the_floor_all_are_equal(maximize):
    mine = PerPrompt(range(20), [0.02 + 0.001 * (i % 3) for i in range(20)], 40, floor=0.05)
    above = PerPrompt(range(20), [0.07 + 0.001 * (i % 3) for i in range(20)], 40, floor=0.05)
    rival = Standing(0.05, tuple(0.001 * (1 + i % 5) for i in range(40)))
    assert compared(mine, rival, maximize=maximize).tail > 0.999
    if maximize:
        assert compared(above, rival, maximize=True).tail == 1.0
        better = Standing(0.2, tuple(0.2 + 0.01 * (-1) ** i for i in range(40)))
        assert compared(mine, better, maximize=True).tail < 1e-6
    else:
        assert compared(above, rival).tail < 1e-6


def equal_means(kind, chance, prompts):
    """Values of a candidate and a rival of the same mean: whoever says worse is wrong."""
    skewed = [chance.lognormvariate(0, 1) for _ in range(prompts)]
    candidate, rival = {
        "independent": lambda: (skewed, [chance.lognormvariate(0, 1) for _ in skewed]),
        "alike": lambda: ([v * chance.lognormvariate(0, 0.5) for v in skewed], skewed),
        "a rival that is bad on a few": lambda: (
            skewed,
            [v * chance.lognormvariate(0, 1) for v in skewed],
        ),
        "a candidate that is good on a few": lambda: (
            [1.0 if chance.random() < 0.9 else 0.02 for _ in skewed],
            [chance.uniform(0.9, 0.95) for _ in skewed],
        ),
    }[kind]()
    scale = sum(candidate) / sum(rival)
    pairs = [(mine, theirs * scale) for mine, theirs in zip(candidate, rival, strict=True)]
    chance.shuffle(pairs)
    return zip(*pairs, strict=True)


@pytest.mark.parametrize(
    "kind",
    [
        "independent",
        "alike",
        "a rival that is bad on a few",
        "a candidate that is good on a few",
    ],
)
def test_of_equals_at_most_the_stated_share_is_called_worse(kind):
    chance, wrong, runs, prompts = random.Random(5), 0, 400, 48
    for _ in range(runs):
        mine, theirs = equal_means(kind, chance, prompts)
        rival = Standing(sum(theirs) / prompts, theirs)
        wrong += any(
            compared(PerPrompt(range(n), mine[:n], prompts), rival).tail <= ERROR / LOOKS
            for n in (12, 24, 36)
        )
    assert wrong / runs <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / runs)
