"""Learned edits are measured at a few strengths, and the one that just meets the target is kept."""

from types import SimpleNamespace

import pytest

from heretic_kl.errors import MeasurementError
from heretic_kl.run.trials import refine
from heretic_kl.run.trials.strength import (
    LEAST_STRONGER,
    MEASUREMENTS,
    STRONGEST,
    WEAKEST,
    AtStrength,
    best_strength,
    next_factor,
)

TARGET = 0.05


def at(factor, refusals):
    """Damage grows with the square of the strength."""
    return AtStrength(factor, refusals, factor**2, f"edit at {factor:.3f}")


def searched(power, share):
    """What is kept where refusals are `share` as learned and fall with a power of the strength."""
    measured = []

    def measure(factor):
        measured.append(at(factor, min(1.0, share * factor**-power)))
        return measured[-1]

    best, *others = best_strength(measure(1.0), TARGET, measure)
    assert {one.factor for one in [best, *others]} == {one.factor for one in measured}
    return best, measured


@pytest.mark.parametrize("power", [1.2, 2.0, 3.3])
@pytest.mark.parametrize("share", [0.005, 0.016, 0.03])
def test_an_edit_below_the_target_is_weakened_and_stays_below(power, share):
    best, measured = searched(power, share)
    assert best.refusals <= TARGET and best.factor < 1 and best.damage < 1
    assert WEAKEST**MEASUREMENTS <= best.factor
    assert len(measured) <= 1 + MEASUREMENTS


@pytest.mark.parametrize("power", [1.5, 2.0, 3.3])
def test_an_edit_above_the_target_is_strengthened_until_it_meets_it(power):
    best, _ = searched(power, 0.08)
    assert best.refusals <= TARGET and 1 < best.factor <= STRONGEST**MEASUREMENTS


def test_an_edit_that_never_meets_it_is_kept_at_the_strength_that_comes_nearest():
    best, measured = searched(0.1, 0.5)
    assert best.factor == max(one.factor for one in measured) > 1


def test_while_none_meets_the_target_more_strengths_are_measured():
    """Three refusals of 94 remain until the edit is 1.7 times as strong."""
    strengths = []

    def measure(factor):
        strengths.append(factor)
        return at(factor, 0.051 if factor < 1.7 else 0.04)

    best, *_ = best_strength(measure(1.0), TARGET, measure)
    assert best.refusals <= TARGET and best.factor == min(f for f in strengths if f >= 1.7)
    assert 1 + MEASUREMENTS < len(strengths) <= 1 + 2 * MEASUREMENTS
    never, measured = searched(0.0, 0.3)
    assert never.refusals == 0.3 and len(measured) == 1 + 2 * MEASUREMENTS


def test_between_a_strength_that_meets_the_target_and_one_that_does_not_lies_the_next():
    factor = next_factor([at(1.0, 0.04), at(0.8, 0.09)], TARGET)
    assert 0.8 < factor < 1.0


@pytest.mark.parametrize(
    "measured",
    [
        [at(1.0, TARGET)],
        [at(1.0, 0.049)],
        [at(1.0, 0.04), at(0.98, 0.06)],
        [at(1.0, 0.04), at(1.2, 0.06)],
    ],
    ids=["at the target", "just below it", "no room between", "more refusals where stronger"],
)
def test_nothing_is_measured_where_nothing_can_be_gained(measured):
    assert next_factor(measured, TARGET) is None


def test_without_time_the_edit_stays_as_it_was_learned():
    def measure(factor):
        raise AssertionError(factor)

    first = at(1.0, 0.01)
    assert best_strength(first, TARGET, measure, lambda met: False) == [first]


def test_a_target_of_no_refusals_is_no_error():
    assert next_factor([at(1.0, 0.0)], 0.0) is None
    assert next_factor([at(1.0, 0.3)], 0.0) == STRONGEST


def test_a_strength_that_cannot_be_measured_loses_nothing():
    def measure(factor):
        raise MeasurementError("the KL is not finite")

    first, failures = at(1.0, 0.3), []
    assert best_strength(first, TARGET, measure, failed=failures.append) == [first]
    assert [str(error) for error in failures] == ["the KL is not finite"]


def test_just_above_the_target_it_becomes_so_much_stronger_that_responses_change():
    first, second = at(1.0, 0.0505), at(LEAST_STRONGER, 0.0505)
    assert next_factor([first], TARGET) == LEAST_STRONGER
    assert next_factor([first, second], TARGET) == pytest.approx(LEAST_STRONGER**3)


@pytest.mark.parametrize(
    ("left", "learns"),
    [(200.0, 150.0), (800.0, 730.0), (100.0, 70.0), (40.0, 30.0), (float("inf"),) * 2],
)
def test_a_fifth_of_the_time_at_most_is_set_aside_for_other_strengths(left, learns):
    trial = SimpleNamespace(refinement=None, seconds=10.0)
    run = SimpleNamespace(study=SimpleNamespace(records=[trial]))
    assert refine._learning_seconds(run, left) == learns


@pytest.mark.parametrize(
    ("left", "refusals", "strengths"),
    [
        (25, 0.0, 2),
        (35, 0.0, 2),
        (35, 0.2, 3),
        (45, 0.0, 3),
        (float("inf"), 0.0, 3),
        (float("inf"), 0.2, 6),
        (5, 0.0, 0),
    ],
)
def test_time_for_strengths_is_shared_with_weaker_ones(monkeypatch, left, refusals, strengths):
    """Each takes 10 s; a third of what fits, rounded down, is left over if the target is met."""
    clock, measured = [0.0], []

    def measure(run, plan, factor):
        clock[0] += 10
        measured.append(factor)
        return AtStrength(factor, refusals, factor, None)

    monkeypatch.setattr(refine.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(refine, "_measure", measure)
    trial = SimpleNamespace(refinement=None, seconds=10.0)
    settings = SimpleNamespace(target_refusals=0.05)
    run = SimpleNamespace(settings=settings, study=SimpleNamespace(records=[trial]))
    kept = refine._at_best_strength(run, {}, deadline=10 + left)
    assert len(kept) == len(measured) == 1 + strengths
