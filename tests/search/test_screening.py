"""Which trials generate responses, and how a study keeps both rungs apart."""

import math
from types import SimpleNamespace

import pytest
import torch

from heretic_kl.run.trials.screening import Screening
from heretic_kl.scoring import Score
from heretic_kl.search import (
    FEWEST_PAIRS,
    LEAST_CORRELATION,
    Screened,
    Standing,
    foretold,
    open_storage,
    promotes,
    rank_correlation,
)
from heretic_kl.search.screening import ALWAYS, PROMISING, SPOT_CHECK
from tests.search.studies import OBJECTIVES, evaluate
from tests.search.test_study import scores_of, study

TARGET = 0.05
UNCHECKED = SPOT_CHECK + 1


def promoted(refusals, damage, rivals=(), number=UNCHECKED):
    return promotes(number, Standing(refusals, (damage,)), rivals, target=TARGET)


def test_promising_trials_generate_responses_and_hopeless_ones_do_not():
    assert promoted(0.0, 1.0)
    assert promoted(PROMISING * TARGET, 0.1)
    assert not promoted(PROMISING * TARGET + 0.01, 0.0)


def test_the_first_trials_and_every_eighth_generate_responses_whatever_rung_one_says():
    numbers = [n for n in range(40) if promoted(1.0, 9.0, number=n)]
    assert numbers == [*range(ALWAYS), 8, 16, 24, 32]


def test_a_trial_that_another_one_dominates_below_the_target_is_screened_out():
    rival = [Standing(TARGET, (0.1,))]
    assert not promoted(0.0, 0.1, rival)  # fewer refusals than the target are no gain
    assert promoted(0.0, 0.09, rival)
    assert promoted(TARGET + 0.01, 0.09, rival)
    assert not promoted(TARGET + 0.01, 0.1, rival)


def test_rank_correlation_is_spearmans():
    assert rank_correlation([(1, 2), (2, 3), (3, 4)]) is None
    assert rank_correlation([(1, 2)] * 9) is None
    rising = rank_correlation([(x, x**3) for x in range(9)])
    assert rising.value == pytest.approx(1) and rising.pairs == 9
    assert rank_correlation([(x, -x) for x in range(9)]).value == pytest.approx(-1)
    # Two pairs swapped among six: 1 - 6 * sum(d^2) / (n * (n^2 - 1)) = 1 - 6 * 4 / 210.
    swapped = rank_correlation([(1, 2), (2, 1), (3, 4), (4, 3), (5, 5), (6, 6)])
    assert swapped.value == pytest.approx(1 - 24 / 210)
    assert swapped.low < swapped.value < swapped.high


def test_ties_share_their_mean_rank():
    # Ranks 1, 2.5, 2.5, 4, 5 against 1.5, 1.5, 3, 4, 5; Pearson's correlation of these by hand.
    pairs = [(10, 7), (20, 7), (20, 8), (30, 9), (40, 11)]
    assert rank_correlation(pairs).value == pytest.approx(8.75 / 9.5)


def test_a_study_keeps_rungs_apart(tmp_path):
    """Screened trials are on no front; the sampler sees what rung 1 says of all of them."""

    def evaluate(edits):
        outcomes = []
        for edit in edits:
            scores = scores_of(edit)
            known = {"kl": scores["kl"]}
            kernel = edit.kernels.get("attention")
            promoted = kernel is not None and kernel.peak_weight > 0.8
            predicted = {"refusals": scores["refusals"].value / 2}
            outcomes.append(Screened(scores if promoted else known, predicted, promoted))
        return outcomes

    with open_storage(None, tmp_path, "s") as storage:
        list(study(storage).run(16, evaluate))
    with open_storage(None, tmp_path, "s") as storage:
        again = study(storage)
        states = {record.state for record in again.records}
        assert states == {"complete", "screened"} and again.finished == 16
        for record in again.records:
            values = storage.get_all_trials(0)[record.number].values
            if record.state == "screened":
                assert record.objectives == () and set(record.scores) == {"kl"}
            else:
                assert record.objectives[0] == record.scores["refusals"].value
                assert record.objectives[0] == pytest.approx(2 * values[0])
            assert values[0] == record.predicted["refusals"]
        assert again.front and all(record.state == "complete" for record in again.front)


def test_predictions_are_held_to_the_limit_of_the_score_they_stand_for(tmp_path):
    with open_storage(None, tmp_path, "s") as storage:
        limited = study(storage, limits={"refusals": 0.05})
        outcomes = iter([0.2, 0.01])

        def evaluate(edits):
            kl = {"kl": Score(1.0, "1")}
            return [Screened(kl, {"refusals": next(outcomes)}, False) for _ in edits]

        list(limited.run(2, evaluate))
        excesses = [trial.constraints["refusals"] for trial in storage.get_all_trials(0)[:2]]
    assert excesses == pytest.approx([0.15, -0.04])


def test_spot_checks_go_by_the_place_of_a_trial_however_many_are_over():
    def scores(engine, plans, names):
        return [{name: Score(0.5, "x") for name in names} for _ in plans]

    places = [SPOT_CHECK - 1, SPOT_CHECK, SPOT_CHECK + 1, 2 * SPOT_CHECK]
    run = SimpleNamespace(
        settings=SimpleNamespace(target_refusals=TARGET),
        study=SimpleNamespace(records=(), places=places),
        suite=SimpleNamespace(objectives=OBJECTIVES, evaluate_objectives=scores),
        refiner=SimpleNamespace(refusal_mass=lambda plan: torch.ones(3)),
        response_log=SimpleNamespace(engine=None),
    )
    outcomes = Screening(run, "refusals").evaluate([{}] * 4)
    assert [outcome.promoted for outcome in outcomes] == [False, True, False, True]


def test_several_workers_measure_every_place_once(tmp_path):
    """An edit that was interrupted has its place when it is measured again; later ones move up."""
    measured = []

    def noted(opened, then=lambda edits: None):
        def measure(edits):
            measured.extend(opened.places)
            then(edits)
            return evaluate(edits)

        return measure

    def interrupt(edits):
        measured.pop()
        raise KeyboardInterrupt

    with open_storage(None, tmp_path, "s") as storage:
        ours, theirs = study(storage, startup=99), study(storage, startup=99)
        other = noted(theirs)
        list(ours.run(2, noted(ours, lambda edits: next(theirs.run(9, other)))))
        assert sorted(measured) == [0, 1]
        with pytest.raises(KeyboardInterrupt):
            list(theirs.run(9, noted(theirs, interrupt)))
        list(ours.run(20, noted(ours)))
        numbers = [record.number for record in ours.records if record.state == "complete"]
    assert sorted(measured) == list(range(20)) and max(numbers) == 20


def test_what_was_trained_on_rung_one_says_nothing_of_how_well_it_foretells():
    def record(predicted, counted, refinement=None):
        return SimpleNamespace(
            state="complete",
            predicted={"refusals": predicted},
            scores={"refusals": Score(counted, "x")},
            refinement=refinement,
        )

    searched = [record(x, x / 2) for x in range(4)]
    assert foretold([*searched, record(-1.0, 9.0, "learned")], "refusals").pairs == 4
    assert foretold(searched[:3], "refusals") is None


def test_with_the_fewest_pairs_the_interval_hardly_ever_lies_above_the_least_correlation():
    """Why the correlation itself decides (docs/decisions/024)."""
    centre, error = math.atanh(0.92), math.sqrt((1 + 0.92**2 / 2) / (FEWEST_PAIRS - 3))
    assert math.tanh(centre - 1.96 * error) < LEAST_CORRELATION
