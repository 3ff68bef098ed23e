import pytest

from heretic_kl.errors import NoTrialError, SelectionError
from heretic_kl.kl import wilson_interval
from heretic_kl.scoring import Score, likely_value
from heretic_kl.search import (
    TrialRecord,
    alike_behind,
    by_score,
    check_rule,
    knee,
    notable_trials,
    pareto_front,
    pick,
)


def trial(number, refusals, kl, state="complete"):
    scores = {"refusals": Score(refusals, ""), "kl": Score(kl, "")}
    return TrialRecord(number, state, {}, None, scores, (refusals, kl))


TRIALS = [
    trial(0, 0.9, 0.01),
    trial(1, 0.5, 0.02),
    trial(2, 0.1, 0.05),
    trial(3, 0.0, 0.90),
    trial(4, 0.5, 0.30),
    trial(5, 0.1, 0.05),
    trial(6, 0.0, 0.01, state="failed"),
]


def test_front_holds_what_nothing_beats_once_each():
    assert [t.number for t in pareto_front(TRIALS)] == [3, 2, 1, 0]
    assert pareto_front([]) == ()


def measured(number, refused, by_prompt, state="complete"):
    """Refusals of 64 responses, and a KL whose interval is wide as prompts differ."""
    low, high = wilson_interval(refused, 64)
    details = {"count": refused, "total": 64}
    kl = sum(by_prompt) / len(by_prompt)
    scores = {
        "refusals": Score(refused / 64, "", interval=(low, high), details=details),
        "kl": Score(kl, "", interval=(kl - 0.05, kl + 0.05), per_prompt=tuple(by_prompt)),
    }
    return TrialRecord(number, state, {}, None, scores, (refused / 64, kl))


def test_what_cannot_be_told_from_a_trial_of_the_front_is_listed_with_it():
    prompts = [0.01 * place for place in range(20)]
    mixed = [value + (0.02 if place % 2 else -0.01) for place, value in enumerate(prompts)]
    trials = [
        measured(0, 2, prompts),
        measured(1, 3, mixed),  # more refusals and KL, but neither for sure
        measured(2, 3, [value + 0.01 for value in prompts]),  # surely more on the same prompts
        measured(3, 30, mixed),  # surely more refusals
        measured(4, 3, mixed, state="failed"),
        measured(5, 3, [*mixed, 0.1]),  # on other prompts
        measured(6, 2, prompts),  # the same edit again
        trial(7, 0.05, 0.11),  # says too little
    ]
    front = pareto_front(trials)
    assert [t.number for t in front] == [0]
    assert alike_behind(front, trials) == {0: (1, 6)}
    assert alike_behind(pareto_front(trials[2:4]), trials[2:4]) == {}
    assert alike_behind((), trials) == {}


def test_the_trial_to_begin_with_meets_the_target_or_is_the_knee():
    front = pareto_front(TRIALS)
    assert [*notable_trials(front, "max-refusals=0.05").items()] == [
        (3, "at the target"),
        (2, "knee"),
    ]
    assert notable_trials(front, "max-refusals=0.2") == {2: "at the target, knee"}
    assert notable_trials(front, "max-refusals=-1") == notable_trials(front, None) == {2: "knee"}


def test_knee_is_near_the_ideal():
    assert knee(pareto_front(TRIALS)).number == 2
    assert knee([TRIALS[0]]).number == 0
    with pytest.raises(SelectionError, match="no finished trial"):
        knee([])


@pytest.mark.parametrize(
    ("rule", "number"),
    [("knee", 2), ("max-refusals=0.05", 3), ("max-refusals=0.6", 1), ("trial=4", 4)],
)
def test_rules(rule, number):
    check_rule(rule, ("refusals", "kl"))
    assert pick(rule, pareto_front(TRIALS), TRIALS).number == number


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("best", "unknown pick rule 'best'"),
        ("max-refusals=few", "'few' is not a number"),
        ("max-refusals=nan", "'nan' is not a number"),
        ("max-refusals=0.1,knee", "unknown pick rule"),
        ("trial=x", "not a trial number"),
        ("max-speed=1", "no objective 'speed'; there are refusals, kl"),
    ],
)
def test_bad_rules_are_refused_before_the_search(rule, message):
    with pytest.raises(SelectionError, match=message):
        check_rule(rule, ("refusals", "kl"))


def test_unmet_rules_say_what_there_is():
    front = pareto_front(TRIALS[:2])
    with pytest.raises(
        SelectionError,
        match=r"no trial has refusals at most 0\.05; the nearest is trial 1 with refusals 0\.5",
    ):
        pick("max-refusals=0.05", front, TRIALS)
    for bound in ("max", "likely"):
        with pytest.raises(SelectionError, match="no score 'speed'; there are refusals, kl"):
            pick(f"{bound}-speed=1", front, TRIALS)
    with pytest.raises(SelectionError, match="no finished trial '99'"):
        pick("trial=99", front, TRIALS)


def test_limits_hold_together_and_at_least_is_a_limit_too():
    def trial(number, refused, kept, kl):
        scores = {
            name: Score(value, "") for name, value in zip("abc", (refused, kept, kl), strict=True)
        }
        return TrialRecord(number, "complete", {}, None, scores, (refused, -kept, kl))

    trials = [trial(0, 0.0, 0.1, 0.1), trial(1, 0.1, 0.9, 0.3), trial(2, 0.1, 0.8, 0.2)]
    front = pareto_front(trials)
    assert len(front) == 3
    assert pick("max-a=0.1,min-b=0.8", front, trials).number == 2
    assert pick("min-b=0.85", front, trials).number == 1
    assert pick("max-a=0.05", front, trials).number == 0
    with pytest.raises(NoTrialError) as error:
        pick("max-a=0,min-b=0.8", front, trials)
    assert error.value.nearest == 1 and error.value.exit_code == 3
    assert "no trial has a at most 0 and b at least 0.8; the nearest is trial 1" in str(error.value)


def counted(number, count, total, kl):
    interval = wilson_interval(count, total)
    details = {"count": count, "total": total}
    refusals = Score(count / total, "", interval=(interval.low, interval.high), details=details)
    objectives = (count / total, kl)
    scores = {"refusals": refusals, "kl": Score(kl, "")}
    return TrialRecord(number, "complete", {}, None, scores, objectives)


def test_a_likely_limit_counts_the_interval():
    trials = [counted(0, 0, 64, 0.3), counted(1, 1, 64, 0.2), counted(2, 3, 64, 0.1)]
    assert pick("max-refusals=0.05", trials, trials).number == 2
    assert pick("likely-refusals=0.05", trials, trials).number == 1
    assert pick("likely-refusals=0.03", trials, trials).number == 0


def test_shares_are_likely_by_their_own_interval_and_other_scores_by_a_part_of_theirs():
    assert likely_value(counted(0, 3, 100, 0.1).scores["refusals"]) < 0.05
    assert likely_value(counted(0, 4, 100, 0.1).scores["refusals"]) > 0.05
    mean = Score(1.0, "", interval=(0.0, 2.0))
    assert likely_value(mean) == pytest.approx(1.0 + 0.8416 / 1.96)
    assert likely_value(Score(1.0, "")) == 1.0 and likely_value(Score(None, "")) is None


def test_where_none_is_likely_the_likeliest_of_those_that_meet_the_limit_is_picked():
    few = [counted(0, 1, 40, 0.3), counted(1, 2, 40, 0.2), counted(2, 9, 40, 0.1)]
    assert pick("likely-refusals=0.05", few, few).number == 0
    assert pick("likely-refusals=0.05", few[1:], few).number == 1
    with pytest.raises(NoTrialError, match="the nearest is trial 2"):
        pick("likely-refusals=0.05", few[2:], few)


def test_below_a_target_the_lower_measured_kl_stands_for_the_tie():
    def tied(number, kl):
        scores = {"refusals": Score(0.5, ""), "kl": Score(kl, "", objective=0.01)}
        return TrialRecord(number, "complete", {}, None, scores, (0.5, 0.01))

    assert [t.number for t in pareto_front([tied(0, 0.009), tied(1, 0.001)])] == [1]


def test_trials_are_sorted_by_a_score_best_first():
    unscored = TrialRecord(9, "complete", {}, None, {"refusals": Score(None, "")}, (0.0,))
    trials = [trial(0, 0.5, 1), unscored, trial(1, 0.9, 2), trial(2, 0.1, 3), trial(3, 0.5, 0)]
    for role, expected in (("minimize", [2, 0, 3, 1, 9]), ("maximize", [1, 0, 3, 2, 9])):
        found = by_score("refusals", trials, {"refusals": role, "kl": "minimize"})
        assert [record.number for record in found] == expected
    assert [t.number for t in by_score("kl", trials, {})] == [3, 0, 1, 2, 9], "none comes last"
    assert by_score("refusals", [], {}) == ()
    with pytest.raises(SelectionError, match="no score 'odd'; there are refusals, kl"):
        by_score("odd", trials, {})
