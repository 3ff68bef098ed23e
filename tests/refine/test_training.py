"""Refining lowers the loss it states, never returns worse than its start, and changes no weight."""

import math
from dataclasses import replace

import pytest
import torch

from heretic_kl.ablation import EditParameters, WeightKernel, build_plan, difference_of_means
from heretic_kl.engine import Engine, forced_sequences
from heretic_kl.errors import MeasurementError
from heretic_kl.model import edited
from heretic_kl.prompts import Prompt
from heretic_kl.refine.checks import Check, Reread
from heretic_kl.refine.objective import Example, Objective, Refusal, minibatches
from heretic_kl.refine.openings import OpeningSet
from heretic_kl.refine.training import (
    Prompts,
    RefineOptions,
    _Learner,
    evaluate,
    refine,
)
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

HARMLESS = tuple(
    Prompt(t) for t in ("how do I make a cake", "please tell me about Rome", "what is the weather")
)
HARMFUL = tuple(
    Prompt(t) for t in ("how do I make a bomb", "tell me what you will not", "bomb Rome please")
)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def lm(request, tmp_path_factory):
    config = TINY_CONFIGS[request.param]()
    return load_tiny_model(save_tiny_model(tmp_path_factory.mktemp(request.param), config))


@pytest.fixture(scope="module")
def parts(lm):
    engine = Engine(lm, batch_size=8)
    reference = engine.reference(HARMLESS, 4)
    examples, first = [], 0
    for sequence in forced_sequences(reference):
        count = len(sequence.scored)
        examples.append(Example(sequence, reference.hidden[first : first + count]))
        first += count
    prompts = Prompts(examples, [tuple(engine.encode(prompt)) for prompt in HARMFUL])
    directions = difference_of_means(
        engine.residual_mean(HARMFUL, 1.0), engine.residual_mean(HARMLESS, 1.0)
    )
    kernel = WeightKernel(peak_weight=0.5, peak_position=1.0, floor_weight=0.5, reach=2.0)
    edit = EditParameters(1.0, {"attention": kernel, "mlp": kernel})
    start = build_plan(edit, directions, lm.architecture.facts())
    return engine, prompts, start


def objective(lm, engine, openings=((5,), (6, 7))):
    return Objective(engine.runner, lm.head, OpeningSet(openings))


def test_the_terms_are_those_of_plain_forward_passes(lm, parts):
    engine, prompts, start = parts
    terms_of = objective(lm, engine)
    with torch.no_grad(), edited(lm.architecture, start):
        terms = terms_of.terms(prompts.harmless, prompts.harmful)
        for index, example in enumerate(prompts.harmless):
            fed = torch.tensor([example.sequence.fed])
            candidate = lm.model(fed).logits[0, list(example.sequence.scored)].log_softmax(-1)
            reference = lm.head.logits(example.hidden).log_softmax(-1)
            kl = (reference.exp() * (reference - candidate)).sum(-1).mean()
            assert float(terms.kl[index]) == pytest.approx(float(kl), abs=1e-4)
        for index, ids in enumerate(prompts.harmful):
            after = lm.model(torch.tensor([[*ids, 6]])).logits[0].softmax(-1)
            mass = after[-2, 5] + after[-2, 6] * after[-1, 7]
            assert float(terms.log_mass[index]) == pytest.approx(math.log(float(mass)), abs=1e-3)


def test_the_probability_of_refusals_is_the_product_over_their_tokens(lm, parts):
    engine, prompts, start = parts
    refusals = [Refusal(prompts.harmful[0], (5, 9, 7)), Refusal(prompts.harmful[2], (6,))]
    with torch.no_grad(), edited(lm.architecture, start):
        terms = objective(lm, engine).terms(prompts.harmless, prompts.harmful[:1], refusals)
        for (ids, response), log in zip(refusals, terms.log_refusals, strict=True):
            rows = lm.model(torch.tensor([[*ids, *response]])).logits[0].log_softmax(-1)
            places = range(len(ids) - 1, len(ids) - 1 + len(response))
            plain = sum(float(rows[p, t]) for p, t in zip(places, response, strict=True))
            assert float(log) == pytest.approx(plain, abs=1e-3)
        others = objective(lm, engine).terms(prompts.harmless, prompts.harmful[:1])
    assert torch.allclose(terms.kl, others.kl, atol=1e-5)
    assert torch.allclose(terms.log_mass, others.log_mass, atol=1e-4)
    assert len(others.log_refusals) == 0


def test_refusals_by_other_words_become_unlikely_and_count_against_a_candidate(lm, parts):
    """No opening sees them: only the candidate's own responses do."""
    engine, prompts, start = parts
    with torch.no_grad(), edited(lm.architecture, start):
        likeliest = int(lm.model(torch.tensor([prompts.harmful[0]])).logits[0, -1].argmax())
    refusal = Refusal(prompts.harmful[0], (likeliest,))

    def log_probability(plan):
        with torch.no_grad(), edited(lm.architecture, plan):
            return float(objective(lm, engine).terms([], [], [refusal]).log_refusals)

    def reread(plan):
        return Reread([refusal] if log_probability(plan) > before - 0.3 else [], 2)

    before = log_probability(start)
    options = RefineOptions(
        steps=60, check_every=10, warmup=1, direction_rate=0.05, strength_rate=0.1, multiplier=5.0
    )
    refined = refine(
        start,
        lm.architecture,
        objective(lm, engine, openings=((42,),)),
        prompts,
        prompts,
        replace(options, mass_limit=0.4),
        reread=reread,
    )
    assert refined.checks[0].refused == 0.5 and refined.checks[0].violation(0.4) > 0
    assert refined.best.refused == 0.0
    assert log_probability(refined.plan) < before - 0.3


def test_unedited_the_kl_is_zero(lm, parts):
    engine, prompts, _ = parts
    with torch.no_grad():
        assert float(objective(lm, engine).terms(prompts.harmless, []).kl.max()) < 1e-5


@pytest.mark.parametrize("form", ["strength", "direction", "factors"])
def test_refining_is_never_worse_than_its_start_and_touches_no_weight(lm, parts, form):
    engine, prompts, start = parts
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    options = RefineOptions(steps=12, form=form, check_every=4, warmup=1, mass_limit=1.0)
    told = []
    refined = refine(
        start, lm.architecture, objective(lm, engine), prompts, prompts, options, tell=told.append
    )
    assert tuple(told) == refined.checks and [c.step for c in told] == [0, 4, 8, 12]
    assert refined.best.kl <= refined.checks[0].kl
    assert refined.plan.keys() == start.keys()
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
    if form == "direction":
        assert refined.best.kl < 0.9 * refined.checks[0].kl


def test_the_mass_limit_comes_before_the_kl(lm, parts):
    engine, prompts, start = parts
    terms_of = objective(lm, engine, openings=tuple((t,) for t in range(5, 25)))
    options = RefineOptions(
        steps=40,
        check_every=10,
        warmup=1,
        mass_limit=0.05,
        direction_rate=0.05,
        strength_rate=0.1,
        harmless_per_step=3,
        harmful_per_step=3,
        multiplier=1.0,
    )
    refined = refine(start, lm.architecture, terms_of, prompts, prompts, options)
    first = refined.checks[0]
    assert first.mass > 0.05 and refined.best.mass < 0.7 * first.mass
    assert refined.checks[-1].threshold < options.threshold


def test_where_nothing_meets_the_limit_the_best_edit_is_made_stronger_too(lm, parts):
    engine, prompts, start = parts
    reread = [1.0, 0.5, 0.45, 0.3]  # shares of refusals; the limit is 0.4
    refined = refine(
        start,
        lm.architecture,
        objective(lm, engine, openings=((42,),)),
        prompts,
        prompts,
        RefineOptions(steps=8, check_every=4, warmup=1, mass_limit=0.4),
        reread=lambda plan: Reread([Refusal((5, 6), (42,))] * int(20 * reread.pop(0)), 20),
    )
    assert [check.refused for check in refined.checks] == [1.0, 0.5, 0.45, 0.3]
    assert refined.best == refined.checks[-1] and refined.steps == 8


def test_no_edit_is_made_stronger_when_the_time_is_over(lm, parts, monkeypatch):
    """The clock advances by 30 s a check, and all of them exceed the limit."""
    engine, prompts, start = parts
    clock = [0.0]
    monkeypatch.setattr("heretic_kl.refine.training.time.perf_counter", lambda: clock[0])

    def reread(plan):
        clock[0] += 30.0
        return Reread([Refusal((5, 6), (42,))], 2)

    options = RefineOptions(steps=4, check_every=4, mass_limit=0.4, seconds=80.0)
    terms_of = objective(lm, engine, openings=((42,),))
    refined = refine(start, lm.architecture, terms_of, prompts, prompts, options, reread=reread)
    assert len(refined.checks) == 2 and clock[0] <= options.seconds


@pytest.mark.parametrize("enough", [1, 2, 3])
def test_an_edit_that_exceeds_the_limit_by_little_is_made_stronger(lm, parts, enough):
    """At most twice; where that is not enough, what met the limit before is returned."""
    engine, prompts, start = parts
    sizes = []

    def reread(plan):
        sizes.append(float(sum(operator.left.norm() for operator in plan.values())))
        fine = len(sizes) in (1, 3 + enough)  # the start, two checks, and those after strengthening
        return Reread((), 2) if fine else Reread([Refusal((5, 6), (42,))], 2)

    refined = refine(
        start,
        lm.architecture,
        objective(lm, engine, openings=((42,),)),
        prompts,
        prompts,
        RefineOptions(steps=8, check_every=4, warmup=1, mass_limit=0.4, multiplier=1e-3, slack=1e9),
        reread=reread,
    )
    steps = [check.step for check in refined.checks]
    assert steps == [0, 4, 8, 8, 8][: 3 + min(enough, 2)] and refined.steps == 8
    for weaker, stronger in zip(sizes[2:], sizes[3:], strict=False):
        assert stronger == pytest.approx(1.01 * 1.25 ** (2 / 3) * weaker)
    kept = refined.checks[-1] if enough <= 2 else refined.checks[0]
    assert refined.best == kept and refined.best.violation(0.4) == 0
    assert refined.best.kl <= refined.checks[0].kl


def test_the_same_seed_gives_the_same_edit(lm, parts):
    engine, prompts, start = parts
    options = RefineOptions(steps=3, check_every=3, mass_limit=1.0)
    runs = [
        refine(start, lm.architecture, objective(lm, engine), prompts, prompts, options).plan
        for _ in range(2)
    ]
    for key in start:
        assert torch.equal(runs[0][key].left, runs[1][key].left)


@pytest.mark.parametrize("beta_kl", [1e-3, 5000.0])
def test_a_fixed_weight_stays_whatever_it_is(lm, parts, beta_kl):
    engine, prompts, start = parts
    options = RefineOptions(steps=3, warmup=1).weighted(beta_kl)
    refined = refine(start, lm.architecture, objective(lm, engine), prompts, prompts, options)
    assert refined.checks[-1].multiplier == 1 / beta_kl


def test_a_time_limit_means_fewer_steps_and_a_last_check(lm, parts):
    engine, prompts, start = parts
    options = RefineOptions(steps=400, check_every=100, mass_limit=1.0, seconds=0.0)
    refined = refine(start, lm.architecture, objective(lm, engine), prompts, prompts, options)
    assert [check.step for check in refined.checks] == [0, 5] and refined.steps == 5


def test_nothing_to_learn_from_is_one_line(lm, parts):
    engine, prompts, start = parts
    empty = Prompts(prompts.harmless, [])
    with pytest.raises(MeasurementError, match="nothing to learn from"):
        refine(start, lm.architecture, objective(lm, engine), empty, prompts, RefineOptions())


def test_minibatches_use_every_index_before_any_comes_again():
    import random

    batches = minibatches(5, 2, random.Random(0))
    drawn = [index for _ in range(5) for index in next(batches)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))


def test_time_that_responses_take_leaves_fewer_steps(lm, parts, monkeypatch):
    """The clock advances in responses alone: 30 s each time, of 150; one check is in reserve."""
    engine, prompts, start = parts
    clock = [0.0]
    monkeypatch.setattr("heretic_kl.refine.training.time.perf_counter", lambda: clock[0])

    def reread(plan):
        clock[0] += 30.0
        return Reread()

    options = RefineOptions(steps=40, check_every=6, mass_limit=1.0, seconds=150.0)
    refined = refine(
        start, lm.architecture, objective(lm, engine), prompts, prompts, options, reread=reread
    )
    assert clock[0] <= options.seconds and 6 < refined.steps < 20


@pytest.mark.parametrize(
    ("seconds", "last", "steps"),
    [(12.5, False, 12), (30.5, False, 30), (80.0, False, 20), (80.0, True, 40), (25.5, True, 25)],
)
def test_steps_fill_a_time_that_is_too_short_for_another_refinement(
    lm, parts, monkeypatch, seconds, last, steps
):
    """The clock advances by a second a step."""
    engine, prompts, start = parts
    clock, step = [0.0], _Learner.step

    def ticking(self):
        clock[0] += 1.0
        step(self)

    monkeypatch.setattr("heretic_kl.refine.training.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(_Learner, "step", ticking)
    options = RefineOptions(steps=20, check_every=10, mass_limit=1.0, seconds=seconds, last=last)
    terms_of = objective(lm, engine)
    refined = refine(start, lm.architecture, terms_of, prompts, prompts, options)
    assert refined.steps == steps


@pytest.mark.parametrize(
    ("steps", "checked"), [(19, [0, 19]), (20, [0, 10, 20]), (29, [0, 10, 29])]
)
def test_no_check_is_made_shortly_before_the_last_one(lm, parts, steps, checked):
    engine, prompts, start = parts
    options = RefineOptions(steps=steps, check_every=10, mass_limit=1.0)
    refined = refine(start, lm.architecture, objective(lm, engine), prompts, prompts, options)
    assert [check.step for check in refined.checks] == checked


def test_a_start_whose_terms_are_known_is_not_evaluated_again(lm, parts, monkeypatch):
    engine, prompts, start = parts
    terms_of, options = objective(lm, engine), RefineOptions(steps=1, mass_limit=1.0)
    known_terms = evaluate(terms_of, lm.architecture, start, prompts, options)
    evaluated = []
    monkeypatch.setattr(
        "heretic_kl.refine.training.evaluate",
        lambda *all_of: evaluated.append(all_of) or evaluate(*all_of),
    )
    arguments = (start, lm.architecture, terms_of, prompts, prompts, options)
    with_it, without = refine(*arguments, evaluated=known_terms), refine(*arguments)
    assert len(evaluated) == 1 + 2
    assert with_it.checks[0].kl == without.checks[0].kl == known_terms.kl
    assert with_it.best.kl == without.best.kl


@pytest.mark.parametrize(("steps", "largest"), [(10, 2.0), (40, 2.0), (80, 1.25), (400, 1.0)])
def test_the_fewer_the_steps_the_larger_the_rates(lm, parts, steps, largest):
    engine, prompts, start = parts
    options = RefineOptions(steps=steps, mass_limit=1.0)
    learner = _Learner(start, lm.architecture, objective(lm, engine), prompts, options)
    rates = [learner._rate(step) for step in range(steps)]
    assert max(rates) == pytest.approx(largest, rel=0.05)
    assert rates.index(max(rates)) == max(0, min(10, steps // 10) - 1)
    assert rates[-1] < 0.15 * largest


def test_terms_that_are_not_finite_are_worse_than_all_others():
    fine = Check(0, 0.5, 0.1, 0.9, 0.0, 3.0, 0.3, 0.1, 1.0)
    bad = fine._replace(kl=math.nan, mass=math.nan, hinge=math.nan)
    assert min([bad, fine], key=lambda check: check.loss) is fine
    assert bad.violation(0.05) == math.inf > fine.violation(0.05)
