"""Hypervolume and importance: what the mathematics says of them."""

import random

import optuna
import pytest

from heretic_kl.search.progress.hypervolume import hypervolume, hypervolume_history
from heretic_kl.search.progress.importance import importances


@pytest.mark.parametrize(
    ("points", "reference", "volume"),
    [
        ([], (1.0, 1.0), 0.0),
        ([(0.25,), (0.5,)], (1.0,), 0.75),
        ([(0.0, 1.0), (1.0, 0.0)], (2.0, 2.0), 3.0),
        ([(0.0, 0.0, 0.0)], (1.0, 2.0, 3.0), 6.0),
        ([(0.0, 2.0)], (1.0, 2.0), 0.0),
        ([(0.0, 0.0, 1.0), (1.0, 1.0, 0.0)], (2.0, 2.0, 2.0), 5.0),
    ],
)
def test_volumes_by_hand(points, reference, volume):
    assert hypervolume(points, reference) == pytest.approx(volume)


@pytest.mark.parametrize("objectives", [2, 3])
def test_a_hypervolume_is_the_share_of_random_points_that_are_dominated(objectives):
    draw = random.Random(objectives)
    points = [tuple(draw.random() for _ in range(objectives)) for _ in range(6)]
    samples = [tuple(draw.random() for _ in range(objectives)) for _ in range(20_000)]
    hits = sum(
        any(all(a <= b for a, b in zip(p, sample, strict=True)) for p in points)
        for sample in samples
    )
    assert hypervolume(points, (1.0,) * objectives) == pytest.approx(hits / 20_000, abs=0.015)
    shuffled = draw.sample(points, len(points))
    assert hypervolume(shuffled, (1.0,) * objectives) == pytest.approx(
        hypervolume(points, (1.0,) * objectives)
    )


def test_the_history_never_falls_and_does_not_depend_on_units():
    draw = random.Random(1)
    points = [(draw.random(), draw.random()) if draw.random() < 0.8 else None for _ in range(40)]
    history = hypervolume_history(points)
    assert len(history) == 40 and history == sorted(history) and 0 < history[-1] <= 1
    scaled = [p and (1000 * p[0] - 7, p[1] / 9) for p in points]
    assert hypervolume_history(scaled) == pytest.approx(history)


def test_histories_that_say_nothing_are_zero():
    assert hypervolume_history([None, None]) == [0.0, 0.0]
    assert hypervolume_history([(1.0, 2.0), (1.0, 2.0)]) == [0.0, 0.0]


def trials(count, **attributes):
    draw = random.Random(0)
    distribution = optuna.distributions.FloatDistribution(0, 1)
    made = []
    for number in range(count):
        values = {"first": draw.random(), "second": draw.random(), "idle": draw.random()}
        made.append(
            optuna.trial.create_trial(
                values=[values["first"] ** 2, values["second"] ** 2],
                params=values,
                distributions=dict.fromkeys(values, distribution),
                user_attrs=attributes,
            )
        )
        made[-1].number = number
    return made


def test_the_parameter_that_decides_an_objective_is_the_most_important_one():
    first, second = importances(trials(60), 2)
    assert max(first, key=first.get) == "first" and max(second, key=second.get) == "second"
    assert sum(first.values()) == pytest.approx(1) and next(iter(first)) == "first"


def test_few_trials_and_refined_ones_give_no_estimate():
    assert importances(trials(9), 2) == []
    assert importances(trials(60, refinement="{}"), 2) == []
