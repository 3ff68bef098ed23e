"""Racing stops what is surely beaten, and changes no value measured whole."""

import itertools
import random
from typing import NamedTuple

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.prompts import Prompt
from heretic_kl.requests import (
    PartialResponses,
    ResponseRequest,
    ResponseResult,
    TeacherForcedRequest,
)
from heretic_kl.scoring import Score, ScorerSpec, Stopped, Suite
from heretic_kl.scoring.racing import Race
from heretic_kl.scoring.scorer import Bounds
from heretic_kl.search.pareto import pareto_front
from heretic_kl.search.records import TrialRecord
from heretic_kl.testing import fake_context, load_tiny_model, save_tiny_model, tiny_llama

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
        sums = [sum(map(float, result.texts)) for result in results if result is not None]
        if self.role == "maximize":
            return Bounds(high=sum(sums) + 4 * (2 - len(sums)), text="at most")
        return Bounds(low=sum(sums), text="at least")


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
                parts = [texts[i] if i in order[:done] else None for i in range(4)]
                parts = [PartialResponses(k.texts, (True,)) if k and done < 2 else k for k in parts]
                ended = ended or race(0, parts)
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
    engine = Engine(lm.limited(tree_problem="off"), batch_size=batch_size, cache_bytes=2**20)
    suite = Suite(specs)
    prompts = {"harmful": HARMFUL, "harmless": HARMLESS}
    suite.prepare(fake_context(engine, prompts_by_kind=prompts))
    return engine, suite


def plans(lm, count):
    outcomes = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(lm.architecture.width, generator=generator)
        weight, lowest = 0.1 * (1 + seed % 9), seed % 3
        sites = lm.architecture.facts()
        outcomes.append(
            {k: ablation_operator(direction, weight) for k in sites if k.layer >= lowest}
        )
    return outcomes


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
    refusals, kl = outcome.at_best
    assert refusals == 0.0 and 0.0 < kl < 0.01
    assert Stopped.from_dict(outcome.to_dict()) == outcome


def test_responses_that_are_decided_bound_the_refusals(lm):
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


def test_a_stopped_trial_is_on_no_front_and_records_with_an_error_rate_are_read():
    stopped = Stopped(1, {"kl": "at least 0.3"}, (0.0, 0.01))
    trial = TrialRecord(2, "stopped", {}, None, stopped=stopped)
    assert [t.number for t in pareto_front([record(1, [1.0, 1.0]), trial])] == [1]
    assert Stopped.from_dict({**stopped.to_dict(), "error": 0.05}) == stopped
