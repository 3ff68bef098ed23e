"""Which parameters come next, and what the sampler is shown of the trials before."""

import json
import math
from statistics import NormalDist

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from heretic_kl.search import sampler
from heretic_kl.search.sampler import STOPPED, Drawer, normal_scores

SPACE = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(0.0, 1.0)}


def trial(
    number, values=None, *, excess=None, at_best=None, state=TrialState.COMPLETE, x=0.5, **more
):
    made = optuna.create_trial(
        state=TrialState.PRUNED if at_best else state,
        values=values,
        params={"x": x, "y": 0.5},
        distributions=SPACE,
        user_attrs={STOPPED: json.dumps({"at_best": at_best})} if at_best else more,
        constraints={} if excess is None else {"refusals": excess},
    )
    made.number = number
    return made


def test_normal_scores_keep_order_and_limits():
    values = [(0.5, 400.0), (0.02, 0.3), (0.0, 0.3), (0.9, 0.001)]
    trials = [trial(n, v, excess=v[0] - 0.05) for n, v in enumerate(values)]
    scored = normal_scores(trials)
    assert [t.number for t in scored] == [0, 1, 2, 3]
    refusals, kl = zip(*(t.values for t in scored), strict=True)
    assert refusals == pytest.approx(
        [NormalDist().inv_cdf(q) for q in (0.625, 0.375, 0.125, 0.875)]
    )
    assert kl[0] == max(kl) < 2 and kl[1] == kl[2]
    assert [t.constraints["refusals"] > 0 for t in scored] == [True, False, False, True]


def test_an_excess_of_nothing_stays_feasible():
    scored = normal_scores([trial(0, (1.0, 1.0), excess=0.0), trial(1, (2.0, 2.0), excess=1.0)])
    assert scored[0].constraints["refusals"] == 0.0


@pytest.mark.parametrize(("gaussian", "startup"), [(100, 2), (3, 2), (3, 7)])
def test_what_was_learned_is_not_laid_to_the_parameters_of_its_start(
    monkeypatch, gaussian, startup
):
    """Whichever sampler draws: a Gaussian process, Parzen estimators, or lots."""
    monkeypatch.setattr(sampler, "GAUSSIAN_TRIALS", gaussian)
    searched = [trial(n, (n / 10, 1.0 - n / 10), excess=n / 10, x=n / 10) for n in range(6)]
    drawn = [
        Drawer(seed=1, startup_trials=startup, objectives=2).draw(
            [*searched, trial(6, values, excess=values[0] - 0.5, x=0.9, refinement="{}")], SPACE, 0
        )
        for values in ((0.0, 1e-6), (1.0, 9.0))
    ]
    assert drawn[0] == drawn[1]
    at_random = optuna.samplers.RandomSampler(seed=sampler.trial_seed(1, 7))
    independent = at_random.sample_independent(None, None, "x", SPACE["x"])
    assert (drawn[0]["x"] == independent) == (startup == 7)


def test_stopped_trials_count_with_their_best():
    scored = normal_scores(
        [
            trial(0, (0.1, 1.0), excess=0.05),
            trial(1, at_best=[0.2, 3.0], excess=0.15),
            trial(2, at_best=[0.2, None], excess=0.15),  # one is not known
            trial(3, at_best=[0.2, 3.0]),  # of a study without constraints of stopped trials
            trial(4, state=TrialState.FAIL),
            trial(5, state=TrialState.RUNNING),
        ]
    )
    assert [t.number for t in scored] == [0, 1]
    assert scored[1].values[0] > scored[0].values[0]
    assert scored[1].state == TrialState.COMPLETE


@pytest.mark.parametrize(("finished", "chosen"), [(1, "Random"), (4, "GP"), (6, "TPE")])
def test_a_gaussian_process_chooses_until_it_costs_too_much(monkeypatch, finished, chosen):
    monkeypatch.setattr(sampler, "GAUSSIAN_TRIALS", 5)
    asked = []
    for name in ("Random", "GP", "TPE"):
        kind = getattr(sampler, f"{name}Sampler")
        spied = kind.sample_relative

        def spy(self, *words, _spied=spied, _name=name):
            asked.append(_name)
            return _spied(self, *words)

        monkeypatch.setattr(kind, "sample_relative", spy)
    trials = [trial(n, (n / 10, 1.0 - n / 10), excess=n / 10, x=n / 10) for n in range(finished)]
    drawn = Drawer(seed=1, startup_trials=2, objectives=2).draw(trials, SPACE, worker=0)
    assert asked == [chosen]
    assert all(0 <= drawn[name] <= 1 for name in SPACE)


def test_it_finds_the_least_damage_that_meets_the_limit():
    """Refusals fall and damage grows with x; y is damage alone. The limit is met from 0.7 on."""
    trials, drawer = [], Drawer(seed=3, startup_trials=6, objectives=2)
    while len(trials) < 22:
        drawn = drawer.draw(trials, SPACE, worker=0)
        refusals = max(0.0, 1.0 - drawn["x"] / 0.74)
        damage = math.exp(6 * (drawn["x"] + drawn["y"]))
        made = optuna.create_trial(
            values=[refusals, damage],
            params=drawn,
            distributions=SPACE,
            constraints={"refusals": refusals - 0.05},
        )
        made.number = len(trials)
        trials.append(made)
    best = min(t.values[1] for t in trials if t.values[0] <= 0.05)
    assert best < math.exp(6 * 0.85)


def test_workers_do_not_draw_what_another_one_runs():
    trials = [trial(n, (n / 10, 1.0 - n / 10), excess=n / 10, x=n / 10) for n in range(6)]
    drawer = Drawer(seed=1, startup_trials=2, objectives=2)
    first = drawer.draw(trials, SPACE, worker=0)
    running = trial(6, state=TrialState.RUNNING, x=first["x"])
    running.params["y"] = first["y"]
    second = drawer.draw([*trials, running], SPACE, worker=1)
    assert math.dist(first.values(), second.values()) > 0.02


def test_no_edit_is_drawn_twice(monkeypatch):
    """Where the best sampler returns to a corner, another one chooses."""
    for kind in (sampler.GPSampler, sampler.TPESampler):
        monkeypatch.setattr(kind, "sample_relative", lambda *words: {"x": 1.0, "y": 0.5})
    trials = [trial(n, (n / 10, 1.0 - n / 10), excess=n / 10, x=n / 5) for n in range(6)]
    drawer = Drawer(seed=1, startup_trials=2, objectives=2)
    assert trials[-1].params == {"x": 1.0, "y": 0.5}
    assert drawer.draw(trials, SPACE, worker=0) not in [t.params for t in trials]
    assert drawer.draw(trials[:-1], SPACE, worker=0) == trials[-1].params
