"""Refinement inside a run: refined trials join the study, are saved, resumed and kept by hash."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sessions import refining

from heretic_kl import Settings, events
from heretic_kl.ablation import LearningSettings, Refinement
from heretic_kl.errors import MeasurementError, ReproductionError, StudyError
from heretic_kl.export import read_reproduction
from heretic_kl.kl import wilson_interval
from heretic_kl.model import placement
from heretic_kl.model.placement import is_offloaded
from heretic_kl.refine import RefineOptions, objective, refiner
from heretic_kl.run.saving.rebuild import rebuild
from heretic_kl.run.trials import refine
from heretic_kl.run.trials.strength import WEAKER
from heretic_kl.scoring import Score, likely_value
from heretic_kl.search import PlanStore

LEARNED = Refinement("", start=0, steps=1, form="direction", rank=1, mass_limit=0.1)
COUNTS = SimpleNamespace(limited="refusals")


@pytest.mark.parametrize("form", ["direction", "factors"])
def test_refined_trials_join_the_study_are_saved_and_resumed(refusing, tmp_path, markers, form):
    table = {"trials": 2, "steps": 6, "kl_tokens": 4, "form": form, "rank": 2}
    run, seen = refining(refusing, tmp_path, markers, refinement=table)
    with run:
        run.search()
        run.refine()
        refined = run.parts.study.refined
        assert len(refined) == 2 and run.parts.study.finished == 3
        first, second = refined
        count = len(run.trials)
        assert first.edit.refinement.start < 3 and second.edit.refinement.start == first.number
        assert first.parameters["refine.steps"] == 6
        asked = [record.edit.refinement.asked for record in refined]
        assert asked[0] == LearningSettings(6, form, 2, 0.05, 4, None, 1.0, seed=0)
        assert asked[1] == replace(asked[0], seed=1)
        assert set(first.scores) == set(run.trials[0].scores)
        plan = run.parts.plan(first.edit)
        scores = run.parts.suite.evaluate(run.parts.engine, plan)
        assert scores["teacher_forced_kl"].value == pytest.approx(
            first.scores["teacher_forced_kl"].value, abs=1e-6
        )
        saved = {
            how: run.save(run.pick(f"trial={first.number}"), tmp_path / how, how)
            for how in ("merged", "lora")
        }
        for result in saved.values():
            assert result.merge_kl <= max(result.noise_floor, 1e-6)
    card = (tmp_path / "merged/README.md").read_text(encoding="utf-8")
    assert f"the {form} of every site's operator was learned" in " ".join(card.split())
    facts = json.loads((tmp_path / "merged/reproduce.json").read_text(encoding="utf-8"))
    assert facts["trial"]["edit"]["refinement"]["sha256"] == first.edit.refinement.sha256
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any("probability of opening with a refusal" in notice for notice in notices)
    again, seen = refining(refusing, tmp_path, markers, refinement=table)
    with again:
        again.search()
        again.refine()  # nothing is left to do
        assert [r.number for r in again.parts.study.refined] == [first.number, second.number]
        assert len(again.trials) == count
    assert not [e for e in seen if isinstance(e, events.Notice) and "learned with" in e.message]
    other, seen = refining(refusing, tmp_path, markers, refinement={**table, "beta_kl": 9.0})
    with other:
        other.refine()
        assert len(other.trials) == count
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    numbers = f"{first.number}, {second.number}"
    assert f"(beta_kl unset, now 9.0): {numbers}; no other is learned" in notices[-1]
    anew, _ = refining(refusing, tmp_path / "anew", markers, refinement=table)
    with anew:
        for how in ("merged", "lora"):
            wanted = read_reproduction(tmp_path / how)
            _, comparison = rebuild(anew.parts, wanted, tmp_path / f"{how}-2", overwrite=False)
            assert (comparison.verdict, comparison.differences) == ("bit for bit", ())
    (tmp_path / "merged/reproduce/learned.safetensors").write_bytes(b"other")
    with pytest.raises(ReproductionError, match="holds other operators"):
        read_reproduction(tmp_path / "merged").learned()


def test_the_strength_that_is_kept_is_that_of_the_trial(refusing, tmp_path, markers, monkeypatch):
    learned = []

    def half(first, target, measure, *rest):
        learned.append(first.outcome[0])
        return [measure(0.5), first]

    monkeypatch.setattr(refine, "best_strength", half)
    table = {"trials": 1, "steps": 4, "kl_tokens": 4}
    run, seen = refining(refusing, tmp_path, markers, refinement=table)
    with run:
        run.search()
        run.refine()
        (record,) = run.parts.study.refined
        plan = run.parts.plan(record.edit)
        for key, operator in learned[0].items():
            change = operator.left @ operator.right.T
            assert torch.allclose(plan[key].left @ plan[key].right.T, 0.5 * change, atol=1e-6)
        learned_under = record.edit.refinement.mass_limit
        assert (record.edit.refinement.strength, learned_under) == (0.5, 0.05)
        masses = [run.parts.refiner.refusal_mass(p).mean() for p in (plan, learned[0])]
        stays = replace(record, scores={})  # no responses ask for another limit
        aim = refine._next_aim(run.parts, run.parts.refiner, stays)
        wanted = learned_under * float(masses[0] / masses[1])
        assert aim.mass_limit == pytest.approx(min(0.5, max(1e-4, wanted)), rel=1e-3)
        run.save(run.pick(f"trial={record.number}"), tmp_path / "saved", "lora")
    card = (tmp_path / "saved/README.md").read_text(encoding="utf-8")
    assert "All of it was multiplied by 0.50 afterwards" in " ".join(card.split())
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any("responses at 0.50 times that strength: " in notice for notice in notices)


def test_every_strength_that_was_measured_is_a_trial_and_weaker_ones_follow(
    refusing, tmp_path, markers, monkeypatch
):
    def weakest(first, target, measure, *rest):
        return [first, measure(1.2)]

    monkeypatch.setattr(refine, "best_strength", weakest)
    run, seen = refining(refusing, tmp_path, markers, refinement={"trials": 1, "steps": 4})
    with run:
        run.search()
        run.refine()
        (learned,) = run.parts.study.refined
        others = [r for r in run.trials if r.refinement and r.number != learned.number]
        strengths = [record.refinement.strength for record in others]
        assert strengths == [1.2, *WEAKER]
        plan = run.parts.plan(learned.edit)
        for record, strength in zip(others, strengths, strict=True):
            of = replace(learned.refinement, of=learned.number, strength=strength)
            assert replace(record.refinement, sha256=of.sha256) == of
            assert set(record.scores) == set(learned.scores)
            assert record.seconds < learned.seconds
            for key, operator in run.parts.plan(record.edit).items():
                change = strength * (plan[key].left @ plan[key].right.T)
                assert torch.allclose(operator.left @ operator.right.T, change, atol=1e-6)
        weakest_kl = others[-1].scores["teacher_forced_kl"].value
        assert weakest_kl < learned.scores["teacher_forced_kl"].value
        numbers = [e.record.number for e in seen if isinstance(e, events.TrialFinished)]
        assert numbers == [record.number for record in run.trials]
        run.save(run.pick(f"trial={others[-1].number}"), tmp_path / "saved", "lora")
    card = (tmp_path / "saved/README.md").read_text(encoding="utf-8")
    assert f"multiplied by 0.35 afterwards, another strength of trial {learned.number}. " in (
        " ".join(card.split())
    )


@pytest.mark.parametrize("problem", ["no time", "a KL that is not finite"])
def test_weaker_strengths_are_no_condition_of_a_learned_edit(
    refusing, tmp_path, markers, monkeypatch, problem
):
    def measure(run, plan, factor):
        if factor == WEAKER[0]:
            raise MeasurementError("the KL is not finite")
        return measured(run, plan, factor)

    measured = refine._measure
    monkeypatch.setattr(refine, "best_strength", lambda first, *others: [first])
    if problem == "no time":
        monkeypatch.setattr(refine, "_in_time", lambda run, deadline: False)
    else:
        monkeypatch.setattr(refine, "_measure", measure)
    run, seen = refining(refusing, tmp_path, markers, refinement={"trials": 1, "steps": 4})
    with run:
        run.search()
        run.refine()
        (learned,) = (record for record in run.trials if record.refinement)
        assert [learned] == [*run.parts.study.refined]
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    line = f"no weaker strength of trial {learned.number} is measured: the KL is not finite"
    assert (line in notices) == (problem != "no time")


def test_a_learned_edit_that_is_missing_or_changed_is_one_line(tmp_path):
    from heretic_kl.ablation import SiteKey, ablation_operator

    store = PlanStore(tmp_path, "study")
    plan = {SiteKey(0, "mlp", "a.b"): ablation_operator(torch.randn(4), 0.5)}
    digest = store.save(plan)
    assert store.save(plan) == digest
    (loaded,) = store.load(digest).values()
    assert torch.equal(loaded.left, next(iter(plan.values())).left)
    with pytest.raises(StudyError, match="is missing"):
        store.load("0" * 64)
    (store.folder / digest).write_bytes(b"other")
    with pytest.raises(StudyError, match="was changed"):
        store.load(digest)
    for path in ("../" + digest, "/dev/zero", str(tmp_path / digest)):
        with pytest.raises(StudyError, match="is no learned edit"):
            store.load(path)


def test_no_refinement_is_one_flag_away(refusing, tmp_path, markers):
    run, _ = refining(refusing, tmp_path, markers, refine=False)
    with run:
        run.search()
        run.refine()
        assert not run.parts.study.refined


def test_a_model_that_refuses_nothing_is_searched_but_not_refined(refusing, tmp_path):
    run, seen = refining(refusing, tmp_path, ["unheard"])
    with run:
        run.search()
        run.refine()
        assert not run.parts.study.refined
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any(notice.startswith("no edit is refined: nothing to learn") for notice in notices)


@pytest.mark.parametrize("change", [{"role": "maximize"}, {"enabled": False}])
def test_where_refusals_are_not_to_be_lowered_nothing_is_refined(
    refusing, tmp_path, markers, change
):
    scorers = {"refusals": {"settings": {"markers": markers}, **change}}
    run, seen = refining(refusing, tmp_path, markers, scorers=scorers, screening=False)
    with run:
        run.search()
        run.refine()
        assert not run.parts.study.refined
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any("no edit is refined: it would lower refusals" in text for text in notices)


def test_minutes_end_the_search_and_the_refinement(refusing, tmp_path, markers):
    run, _ = refining(refusing, tmp_path, markers, minutes=1e-4, trials=500)
    with run:
        run.search()
        assert 0 < len(run.trials) < 500 or not run.trials
        run.refine()
        assert len(run.parts.study.refined) <= 1


def test_the_mass_limit_stays_within_what_a_study_accepts(refusing, tmp_path, markers):
    table = {"trials": 3, "steps": 5, "kl_tokens": 4, "mass_limit": 1e-4}
    run, _ = refining(refusing, tmp_path, markers, refinement=table, target_refusals=0)
    with run:
        run.search()
        run.refine()
        assert all(1e-4 <= r.edit.refinement.mass_limit <= 0.5 for r in run.parts.study.refined)
        assert len(run.parts.study.refined) == 3


@pytest.mark.parametrize(
    ("refused", "total", "least", "most"),
    [(20, 40, 0.4, 0.4), (3, 100, 1.0, 1.1), (4, 100, 0.7, 1.0), (1, 64, 1.0, 2.0), (0, 40, 2, 2)],
)
def test_refinement_aims_at_what_the_default_rule_picks(refused, total, least, most):
    share, interval = refused / total, wilson_interval(refused, total)
    details = {"count": refused, "total": total}
    score = Score(share, "", interval=(interval.low, interval.high), details=details)
    record = SimpleNamespace(scores={"refusals": score}, refinement=LEARNED)
    run = SimpleNamespace(settings=Settings(target_refusals=0.05), suite=COUNTS)
    aim = refine._next_aim(run, None, record)
    assert 0.1 * least <= aim.mass_limit <= 0.1 * most
    accepted = not refused or likely_value(score) <= 0.05
    assert accepted == (aim.mass_limit >= 0.1)


def test_without_counted_refusals_the_limit_stays():
    record = SimpleNamespace(scores={}, refinement=LEARNED)
    run = SimpleNamespace(settings=Settings(target_refusals=0.05), suite=COUNTS)
    assert refine._next_aim(run, None, record).mass_limit == 0.1


def test_damage_is_in_nats_where_a_scorer_is_and_never_what_is_maximized():
    def run(*units_and_roles):
        names = [f"s{i}" for i in range(len(units_and_roles))]
        pairs = list(zip(names, units_and_roles, strict=True))
        specs = [SimpleNamespace(name=name, role=role) for name, (_, role) in pairs]
        scorers = {name: SimpleNamespace(unit=unit) for name, (unit, _) in pairs}
        suite = SimpleNamespace(objectives=specs, scorers=scorers, limited="refusals")
        return SimpleNamespace(suite=suite)

    scores = {"s0": Score(0.05, ""), "s1": Score(0.3, ""), "refusals": Score(0.9, "")}
    assert refine._damage(run(("nats", "minimize"), ("share", "minimize")), scores) == 0.05
    assert refine._damage(run(("nats", "minimize"), ("nats", "minimize")), scores) == 0.3
    assert refine._damage(run(("share", "minimize"), ("share", "maximize")), scores) == 0.05
    assert refine._damage(run(("share", "maximize")), scores) == 0


def test_gradient_checkpointing_is_in_force_in_every_step_and_in_no_check(
    refusing, tmp_path, markers, monkeypatch
):
    entered, checkpointing = [], objective.gradient_checkpointing

    def counted(layers):
        entered.append(layers)
        return checkpointing(layers)

    def too_large(*parts, **others):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(objective, "gradient_checkpointing", counted)
    table = {"trials": 1, "steps": 6, "kl_tokens": 4, "gradient_checkpointing": True}
    run, _ = refining(refusing, tmp_path, markers, refinement=table)
    with run:
        run.search()
        run.refine()
        assert [record.edit.refinement.steps for record in run.parts.study.refined] == [6]
        assert [layers for layers in entered if layers] == [run.parts.lm.architecture.layers] * 6
        monkeypatch.setattr(refiner, "refine", too_large)
        with pytest.raises(MeasurementError, match="one prompt of each kind in a step$"):
            run.parts.refiner.refine({}, RefineOptions())


def test_running_out_of_memory_makes_smaller_steps_and_batches(
    refusing, tmp_path, markers, monkeypatch
):
    learn, portions, sizes = refiner.refine, objective.forced_portions, []

    def small_steps(*parts, **others):
        sizes.append((parts[-1].harmless_per_step, parts[-1].harmful_per_step))
        if sizes[-1][0] > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(*parts, **others)

    def small_batches(lm, batches):
        if batches.max_rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return portions(lm, batches)

    run, seen = refining(refusing, tmp_path, markers)
    with run:
        run.search()
        monkeypatch.setattr(refiner, "refine", small_steps)
        largest = 2
        run.refine()
        notices = [event.message for event in seen if isinstance(event, events.Notice)]
        assert "out of memory: refinement takes 3 prompts a step now" in notices
        assert len(run.parts.study.refined) == 2 and sizes[:3] == [(8, 4), (4, 2), (2, 1)]
        plan, learner = run.parts.plan(run.trials[0].edit), run.parts.refiner
        whole = learner.evaluate(plan).loss, learner.refusal_mass(plan)
        monkeypatch.setattr(objective, "forced_portions", small_batches)
        assert learner.evaluate(plan).loss == pytest.approx(whole[0], rel=1e-3)
        assert torch.allclose(learner.refusal_mass(plan), whole[1], rtol=1e-3)
        assert run.parts.engine.batch_size <= 4
        largest = 0
        message = "one prompt of each kind in a step: try --refinement.gradient-checkpointing$"
        with pytest.raises(MeasurementError, match=message):
            learner.refine(plan, RefineOptions())
        assert sizes[-1] == (1, 1)


@pytest.mark.parametrize(
    ("step", "learned"), [("_first_aim", 0), ("_at_best_strength", 1), ("responses", 0)]
)
def test_no_edit_is_learned_once_weights_are_offloaded(
    refusing, tmp_path, markers, monkeypatch, step, learned
):
    run, seen = refining(refusing, tmp_path, markers)
    with run:
        run.search()
        engine = run.parts.engine
        where = engine.runner if step == "responses" else refine
        work = getattr(where, step)

        def out_of_memory(*parts, **others):
            assert engine._offload() or is_offloaded(engine.lm.model)
            return work(*parts, **others)

        monkeypatch.setattr(placement, "on_accelerator", lambda tensor: True)
        monkeypatch.setattr(where, step, out_of_memory)
        run.refine()
        assert len(run.parts.study.refined) == learned
    last = [event.message for event in seen if isinstance(event, events.Notice)][-1]
    assert last.startswith("no further edit is refined: parts of the model are offloaded, and grad")
