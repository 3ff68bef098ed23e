"""Racing stops what is beaten, no oftener wrong than said, and changes no value measured whole."""

import itertools
import json
import math
import random
from typing import NamedTuple

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.errors import ScorerError
from heretic_kl.prompts import Prompt
from heretic_kl.requests import (
    PartialResponses,
    PartialRows,
    ResponseRequest,
    ResponseResult,
    TeacherForcedRequest,
    TeacherForcedResult,
)
from heretic_kl.scoring import MeasuringContext, Score, ScorerSpec, Stopped, Suite
from heretic_kl.scoring.racing import PER_PROMPT, Race
from heretic_kl.scoring.scorer import Bounds, PerPrompt
from heretic_kl.search.pareto import pareto_front
from heretic_kl.search.records import TrialRecord
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama

WORDS = "how do I make a cake bomb please tell me about the weather in Rome".split()
HARMFUL = tuple(Prompt(" ".join(WORDS[i % 5 : 5 + i])) for i in range(1, 9))
HARMLESS = tuple(Prompt(" ".join(WORDS[i % 4 : 6 + i])) for i in range(1, 9))
SPECS = (
    ScorerSpec("refusals", "refusals", "minimize", {"markers": ["flour", "mix", "bomb"]}),
    ScorerSpec("kl", "teacher_forced_kl", "minimize", {"set_aside_refused": False}),
)
ONE, TWO = (ResponseRequest((Prompt(word),), 1) for word in ("one", "two"))


class Part(NamedTuple):
    """An objective whose value is the sum of numbers in the texts."""

    name: str
    role: str

    def score(self, results):
        total = sum(float(text) for result in results for text in result.texts)
        return Score(total, f"{total}")

    def bounds(self, results):
        known = [sum(map(float, result.texts)) for result in results if result is not None]
        if self.role == "maximize":
            return Bounds(high=sum(known) + 4 * (2 - len(known)), text="at most")
        return Bounds(low=sum(known), text="at least")


def record(number, objectives):
    scores = {str(i): Score(value, "") for i, value in enumerate(objectives)}
    return TrialRecord(number, "complete", {}, None, scores, tuple(objectives))


@pytest.mark.parametrize("roles", list(itertools.product(["minimize", "maximize"], repeat=2)))
def test_no_trial_that_would_be_on_the_front_is_ever_stopped(roles):
    """Brute force over random searches: small whole numbers, so that ties are common."""
    chance = random.Random(f"{roles}")
    stopped = 0
    for _ in range(150):
        raced, whole = [], []
        for number in range(25):
            numbers = [[chance.randint(0, 4) for _ in range(2)] for _ in roles]
            judges = [Part(str(i), role) for i, role in enumerate(roles)]
            race = Race(judges, {"0": slice(0, 2), "1": slice(2, 4)}, pareto_front(raced))
            texts = [ResponseResult((str(value),)) for pair in numbers for value in pair]
            ended = False
            order = chance.sample(range(4), 4)
            for done in range(1, 4):
                known = [texts[i] if i in order[:done] else None for i in range(4)]
                known = [PartialResponses(k.texts, (True,)) if k and done < 2 else k for k in known]
                ended = ended or race(0, known)
            objectives = [
                -sum(pair) if role == "maximize" else sum(pair)
                for pair, role in zip(numbers, roles, strict=True)
            ]
            whole.append(record(number, objectives))
            if ended:
                stopped += 1
                assert all(a <= b for a, b in zip(race.stopped[0].at_best, objectives, strict=True))
            else:
                raced.append(whole[-1])
        assert pareto_front(raced) == pareto_front(whole)
    assert stopped > 300


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_tiny_model(save_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_llama()))


def prepared(lm, batch_size=3, specs=SPECS):
    engine = Engine(lm, batch_size=batch_size, cache_bytes=2**20, trees=False)
    suite = Suite(specs)
    prompts = {"harmful": HARMFUL, "harmless": HARMLESS}
    suite.prepare(MeasuringContext(engine, prompts, 3, 8))
    return engine, suite


def plans(lm, count):
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(lm.architecture.width, generator=generator)
        weight, lowest = 0.1 * (1 + seed % 9), seed % 3
        sites = lm.architecture.facts()
        found.append({k: ablation_operator(direction, weight) for k in sites if k.layer >= lowest})
    return found


@pytest.mark.parametrize("at_once", [1, 4])
def test_racing_changes_no_finished_value_and_keeps_the_front(lm, at_once):
    engine, suite = prepared(lm, batch_size=16)
    whole = [suite.evaluate_objectives(engine, [plan])[0] for plan in plans(lm, 24)]
    raced, stopped = [], 0
    for first in range(0, 24, at_once):
        group = plans(lm, 24)[first : first + at_once]
        rivals = pareto_front(raced)
        outcomes = suite.evaluate_objectives(engine, group, rivals=rivals)
        together = suite.evaluate_objectives(engine, group)
        for number, outcome, expected in zip(itertools.count(first), outcomes, together):
            if isinstance(outcome, Stopped):
                stopped += 1
                values = [score.optimized for score in expected.values()]
                rival = next(r for r in rivals if r.number == outcome.dominated_by)
                assert all(a <= b for a, b in zip(rival.objectives, values, strict=True))
                assert tuple(rival.objectives) != tuple(values)
                best = outcome.at_best
                assert all(a <= b + 1e-9 for a, b in zip(best, values, strict=True))
            else:
                if at_once == 1:
                    assert outcome == expected == whole[number]
                raced.append(record(number, [s.optimized for s in outcome.values()]))
    assert stopped > 5
    if at_once == 1:
        everything = [
            record(i, [s.optimized for s in scores.values()]) for i, scores in enumerate(whole)
        ]
        assert [t.number for t in pareto_front(raced)] == [
            t.number for t in pareto_front(everything)
        ]


def layer_calls(lm):
    calls = []
    handle = lm.architecture.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    return calls, handle


@pytest.fixture
def small_portions(monkeypatch):
    from heretic_kl.engine import runner
    from heretic_kl.engine.teacher_forcing import forward as forcing

    monkeypatch.setattr(forcing, "PORTION_ROWS", 4)
    monkeypatch.setattr(runner, "CPU_TREE_TOKENS", 64)


def test_less_is_run_of_what_is_beaten_and_the_record_says_how_much(lm, small_portions):
    engine, suite = prepared(lm, batch_size=2)
    plan = plans(lm, 6)[5]
    engine.measure(plan, suite.requests())
    calls, handle = layer_calls(lm)
    suite.evaluate_objectives(engine, [plan])
    whole = len(calls)
    calls.clear()
    (outcome,) = suite.evaluate_objectives(engine, [plan], rivals=[record(7, [0.0, 0.0])])
    handle.remove()
    assert len(calls) < whole / 4
    assert outcome.dominated_by == 7
    assert list(outcome.findings) == ["kl"]
    assert outcome.findings["kl"].startswith("at least ")
    assert outcome.findings["kl"].endswith(" nats after 2 of 8 prompts")
    assert outcome.at_best == (0.0, 0.01)
    assert Stopped.from_dict(outcome.to_dict()) == outcome


def test_answers_that_are_decided_bound_the_refusals(lm):
    engine, suite = prepared(lm, batch_size=2)
    plan = plans(lm, 3)[2]
    (whole,) = suite.evaluate_objectives(engine, [plan])
    refused, kl = (score.optimized for score in whole.values())
    assert refused > 2 / 8
    (outcome,) = suite.evaluate_objectives(engine, [plan], rivals=[record(0, [1 / 8, kl])])
    assert isinstance(outcome, Stopped) and outcome.findings["kl"] == whole["kl"].text
    assert "at least 2/8 after" in outcome.findings["refusals"]
    # Not beaten for sure: by an equal trial, or by one with more refusals.
    for rival in ([refused, kl], [refused + 1 / 8, 0.0]):
        assert suite.evaluate_objectives(engine, [plan], rivals=[record(0, rival)]) == [whole]


def test_a_scorer_without_bounds_is_measured_whole(lm, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from heretic_kl.scoring import ResponseRequest, Score, Scorer\n"
        "class Mine(Scorer):\n"
        "    def prepare(self, context):\n"
        "        self.prompts = context.prompts('harmful')\n"
        "    def requests(self):\n"
        "        return [ResponseRequest(self.prompts, 5)]\n"
        "    def score(self, results):\n"
        "        return Score(float(len(results[0].texts[0])), 'x')\n",
        encoding="utf-8",
    )
    specs = (SPECS[1], ScorerSpec("mine", str(path), "minimize", {}))
    engine, suite = prepared(lm, specs=specs)
    (outcome,) = suite.evaluate_objectives(engine, plans(lm, 1), rivals=[record(3, [0.0, -1.0])])
    assert set(outcome) == {"kl", "mine"}


def test_several_side_by_side_leave_one_by_one(lm):
    """One is beaten by its KL, one by its refusals, one not at all."""
    engine, suite = prepared(lm, batch_size=8)
    group = plans(lm, 3)
    whole = suite.evaluate_objectives(engine, group)
    heard = []

    def watch(candidate, known):
        heard.append(candidate)
        forced = isinstance(known[1], type(None))
        return candidate == 0 or (candidate == 1 and not forced and known[0] is not None)

    results = engine.measure_many(group, suite.requests(), watch)
    assert results[0] is None and results[1] is None
    alone = engine.measure_many(group[2:], suite.requests())[0]
    assert results[2][0] == alone[0]
    assert heard.count(0) == 1 and heard.count(2) > 2
    assert len(whole) == 3


def test_final_measurements_are_never_raced(lm):
    """`evaluate`, which the test prompts and saving use, knows no rivals."""
    engine, suite = prepared(lm)
    scores = suite.evaluate(engine, plans(lm, 1)[0])
    assert set(scores) == {"refusals", "kl"}
    assert all(isinstance(r, TeacherForcedRequest | ResponseRequest) for r in suite.requests())


# --- at a stated error rate -----------------------------------------------------------------

P, ERROR = 48, 0.1


class Mean(NamedTuple):
    """An objective whose value is the mean of one number a prompt, none of them negative."""

    name: str
    role: str = "minimize"

    def score(self, results):
        raise AssertionError("the candidate was to be stopped before")

    def bounds(self, results):
        return Bounds(low=sum(self.per_prompt(results).values) / P, text="at least")

    def per_prompt(self, results):
        rows = results[0].rows
        return PerPrompt(rows.prompt_index.tolist(), rows.columns[0].tolist(), P)


def finished(number, values, other=0.0):
    mean = sum(values) / P
    scores = {"mean": Score(mean, "", details={PER_PROMPT: list(values)})}
    return TrialRecord(number, "complete", {}, None, scores, (other, mean))


def portions(values, step=4):
    for count in range(step, P, step):
        rows = torch.arange(count)
        column = torch.tensor(values[:count], dtype=torch.float64)
        yield count, PartialRows(TeacherForcedResult((column,), rows, torch.zeros_like(rows)))


def raced(values, rivals, error=ERROR, other="1"):
    """After how many prompts a candidate was stopped, and how; the other objective is whole."""
    judges = [Part("other", "minimize"), Mean("mean")]
    race = Race(judges, {"other": slice(0, 1), "mean": slice(1, 2)}, rivals, error)
    for count, part in portions(values):
        if race(0, [ResponseResult((other,)), part]):
            return count, race.stopped[0]
    return P, None


def drawn(chance, scale=1.0):
    return [scale * chance.lognormvariate(0, 1) for _ in range(P)]


def test_of_candidates_like_their_rivals_few_are_stopped_wrongly():
    chance, wrong, exactly, runs = random.Random(3), 0, 0, 400
    for _ in range(runs):
        rivals = [finished(n, drawn(chance, 1 + n / 10), other=-float(n)) for n in range(3)]
        values = drawn(chance)
        _, stopped = raced(values, rivals)
        if stopped is not None and stopped.error:
            theirs = next(r for r in rivals if r.number == stopped.dominated_by)
            wrong += sum(values) / P <= theirs.objectives[1]
        _, stopped = raced(values, rivals, error=0.0)
        if stopped is not None:
            exactly += 1
            theirs = next(r for r in rivals if r.number == stopped.dominated_by)
            assert stopped.error == 0.0 and theirs.objectives[1] < sum(values) / P
    assert exactly > 20
    assert wrong / runs <= ERROR + 3 * math.sqrt(ERROR * (1 - ERROR) / runs)


def test_what_is_clearly_worse_is_stopped_earlier_than_by_exact_bounds():
    chance, tested, exact = random.Random(4), [], []
    for _ in range(100):
        rival = finished(7, drawn(chance))
        theirs = rival.scores["mean"].details[PER_PROMPT]
        values = [1.8 * value * chance.lognormvariate(0, 0.2) for value in theirs]
        count, stopped = raced(values, [rival])
        tested.append(count)
        exact.append(raced(values, [rival], error=0.0)[0])
        assert stopped.dominated_by == 7
        if stopped.error:
            assert stopped.error == ERROR
            assert stopped.findings["mean"].startswith("worse by ")
            assert stopped.findings["mean"].endswith(f" on {count} of 48 prompts (error rate 0.1)")
            assert stopped.at_best[1] <= sum(values) / P
            assert Stopped.from_dict(json.loads(json.dumps(stopped.to_dict()))) == stopped
    assert sum(tested) < 0.85 * sum(exact)
    assert max(tested) < P


def test_better_in_what_is_known_is_never_stopped_and_rivals_without_values_are_raced_exactly():
    chance = random.Random(6)
    rival, worse = finished(7, drawn(chance)), drawn(chance, 6.0)
    assert raced(worse, [rival])[1] is not None
    assert raced(worse, [rival], other="-1") == (P, None)
    bare = record(7, rival.objectives)
    assert raced(worse, [bare]) == raced(worse, [rival], error=0.0)
    assert raced(worse, [bare])[1].error == 0.0


def test_a_stopped_trial_is_on_no_front_and_old_ones_are_read():
    stopped = Stopped(1, {"kl": "worse"}, (0.0, 0.01), 0.05)
    trial = TrialRecord(2, "stopped", {}, None, stopped=stopped)
    assert [t.number for t in pareto_front([record(1, [1.0, 1.0]), trial])] == [1]
    old = {key: value for key, value in stopped.to_dict().items() if key != "error"}
    assert Stopped.from_dict(old).error == 0.0


def test_a_search_races_by_kept_values_and_changes_none(lm, small_portions):
    texts = [" ".join(WORDS[i % 7 : 8 + i % 5]) + f" {i}" for i in range(40)]
    prompts = {"harmful": HARMFUL, "harmless": tuple(map(Prompt, texts))}
    engine, suite = Engine(lm, batch_size=4, cache_bytes=2**20), Suite(SPECS)
    suite.prepare(MeasuringContext(engine, prompts, 3, 8))
    whole = [suite.evaluate_objectives(engine, [plan])[0] for plan in plans(lm, 12)]
    for scores in whole:
        kept = {name: score.details[PER_PROMPT] for name, score in scores.items()}
        assert len(kept["kl"]) == 40 and set(kept["refusals"]) <= {0.0, 1.0}
        assert sum(kept["kl"]) / 40 == pytest.approx(scores["kl"].value, rel=1e-6)
        for name, score in scores.items():
            assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score, name
    best = dict(min(whole, key=lambda scores: scores["kl"].value))
    objectives = (0.0, best["kl"].optimized)  # as if nothing were refused
    rival = TrialRecord(50, "complete", {}, None, best, objectives)
    errors = []
    for plan, expected in zip(plans(lm, 12), whole, strict=True):
        (outcome,) = suite.evaluate_objectives(engine, [plan], rivals=[rival], error_rate=0.2)
        if isinstance(outcome, Stopped):
            assert not outcome.error or expected["kl"].optimized > objectives[1]
            errors.append(outcome.error)
        else:
            assert outcome == expected
    assert 0.2 in errors


def test_values_that_are_not_the_scores_are_refused(lm, tmp_path):
    path = tmp_path / "off.py"
    path.write_text(
        "from heretic_kl.scoring import PerPrompt, ResponseRequest, Score, Scorer\n"
        "class Off(Scorer):\n"
        "    def prepare(self, context):\n"
        "        self.prompts = context.prompts('harmful')\n"
        "    def requests(self):\n"
        "        return [ResponseRequest(self.prompts, 1)]\n"
        "    def score(self, results):\n"
        "        return Score(1.0, 'x')\n"
        "    def per_prompt(self, results):\n"
        "        return PerPrompt([0], [2.0], 1)\n",
        encoding="utf-8",
    )
    engine, suite = prepared(lm, specs=(ScorerSpec("off", str(path), "minimize", {}),))
    with pytest.raises(ScorerError, match="'off': the mean of per_prompt is 2, the score 1"):
        suite.evaluate_objectives(engine, plans(lm, 1))
