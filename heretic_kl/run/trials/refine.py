"""Learns edits by gradient after the search, along the front. One step of a run.

Each refined trial starts from the best edit so far; its limit on refusal mass follows what the
responses of the one before it said. Responses decide: each is measured as any other trial, at the
strength at which it just meets the target. Other strengths that were measured are trials too, and
weaker ones of the best edit are measured last, for people who accept more refusals.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias

from heretic_kl.ablation import LearningSettings, Plan, Refinement
from heretic_kl.errors import HereticKLError, MeasurementError
from heretic_kl.events import TrialFinished
from heretic_kl.model.placement import is_offloaded
from heretic_kl.ranks import from_first
from heretic_kl.refine import (
    Check,
    Refined,
    RefineOptions,
    Refiner,
    removes_single_directions,
)
from heretic_kl.refine.checks import STRENGTHENINGS
from heretic_kl.run.parts import RunParts
from heretic_kl.run.trials.learned import learned_otherwise
from heretic_kl.run.trials.strength import MEASUREMENTS, WEAKER, AtStrength, best_strength
from heretic_kl.scoring import Score, Stopped, likely_value
from heretic_kl.search import Screened, TrialRecord

TIGHTER, LOOSER = 0.4, 2.0
"""Least and most that the mass limit is multiplied by from one refinement to the next."""
LOWEST_MASS_LIMIT, HIGHEST_MASS_LIMIT = 1e-4, 0.5
"""Below the first one, which the study accepts, no prompt is told from another."""
SHARE_WORTH_IT = 0.25
"""Of the longest refinement: where less time is left, no other is begun."""
SHARE_OF_STRENGTHS = 0.2
"""Of the time that is left, at most, is set aside for measuring an edit at other strengths."""
STARTS = 2
"""Trials whose loss is compared before the first one is refined."""


_Measured: TypeAlias = tuple[Plan, Mapping[str, Score]]


@dataclass(frozen=True)
class _Aim:
    """Where the next refinement starts and what it aims at."""

    start: TrialRecord
    mass_limit: float
    evaluated: Check | None = None
    """What is known of the start, on validation prompts."""


def refine_front(run: RunParts) -> None:
    """Add refined trials to the study until it holds as many as the settings say.

    Says why where nothing can be learned: that is no error of the run.
    """
    table = run.settings.refinement
    wanted = table.trials if run.settings.learns else 0
    if wanted and (notice := learned_otherwise(run.study.refined, table)):
        run.tell.notice(notice)
    if wanted <= len(run.study.refined):
        return
    if not run.suite.lowers_refusals:
        run.tell.notice("no edit is refined: it would lower refusals, which no scorer asks for")
        return
    if is_offloaded(run.lm.model):
        run.tell.notice(
            "no edit is refined: parts of the model are offloaded, and gradients need all of it"
        )
        return
    if run.settings.edit.norm != "none" and table.form != "factors":
        run.tell.notice(
            "no edit is refined: with --edit.norm row or normalized_row only --refinement.form "
            "factors can be learned"
        )
        return
    deadline = _deadline(run)
    each_time = math.ceil(table.steps / RefineOptions.check_every) + 1 + STRENGTHENINGS
    timed = run.settings.minutes is not None  # then the clock decides how many
    checks = None if timed else each_time * (wanted - len(run.study.refined))
    with run.tell.stage("refine", "Refining edits", checks):
        try:
            refiner = run.refiner
            refiner.prepare()
            aim = _first_aim(run, refiner)
        except MeasurementError as error:
            run.tell.notice(f"no edit is refined: {error}")
            return
        try:
            _refine_until(run, refiner, aim, wanted, deadline)
        except MeasurementError as error:
            run.tell.notice(f"no further edit is refined: {error}")
        _measure_weaker(run, refiner, deadline)


def _refine_until(
    run: RunParts, refiner: Refiner, first: _Aim, wanted: int, deadline: float
) -> None:
    aim: _Aim | None = first
    longest = 0.0
    while len(run.study.refined) < wanted or _misses_in_time(run):
        begun = time.perf_counter()
        seconds = from_first(lambda: _learning_seconds(run, deadline - begun))  # noqa: B023
        if seconds < SHARE_WORTH_IT * longest or seconds <= 0:
            break
        if aim is None:
            aim = _next_aim(run, refiner, run.study.refined[-1])
            seconds -= from_first(lambda: time.perf_counter() - begun)  # noqa: B023
        records = _refine_once(run, refiner, aim, seconds, deadline)
        longest = max(longest, from_first(lambda: time.perf_counter() - begun))  # noqa: B023
        aim = None
        for record in records:
            _tell(run, record, wanted, longest * max(0, wanted - len(run.study.refined)))


def _measure_weaker(run: RunParts, refiner: Refiner, deadline: float) -> None:
    """Add weaker strengths of the best learned edit to the front, while there is time."""
    target = run.settings.target_refusals
    best = min(
        run.study.refined,
        key=lambda record: _at_strength(run, record.scores, 1.0, {}).order(target),
        default=None,
    )
    for factor in WEAKER if best else ():
        assert best is not None and best.refinement is not None
        if not _in_time(run, deadline):
            break
        strength = best.refinement.strength * factor
        try:
            weaker = replace(_measure(run, _plan(run, best), factor), factor=strength)
            record = _add_strength(run, refiner, best, weaker)
        except HereticKLError as error:
            run.tell.notice(f"no weaker strength of trial {best.number} is measured: {error}")
            break
        _tell(run, record, len(run.study.refined), 0.0)


def _tell(run: RunParts, record: TrialRecord, wanted: int, left: float) -> None:
    count = run.study.finished + sum(1 for r in run.study.records if r.refinement)
    total = max(count, run.study.finished + wanted)
    run.tell(TrialFinished(record, count, total, run.study.front, left))


def _misses_in_time(run: RunParts) -> bool:
    """Whether no trial meets the target in a run that a clock ends."""
    target, counted = run.settings.target_refusals, run.suite.limited
    scores = [record.scores.get(counted) for record in run.study.records]
    missed = all(s is None or _likely_refusals(s, target) > target for s in scores)
    return missed and run.settings.minutes is not None


def _first_aim(run: RunParts, refiner: Refiner) -> _Aim:
    """The last refined trial, or the trial with the smallest loss."""
    if run.study.refined:
        record = run.study.refined[-1]
        return _next_aim(run, refiner, record)
    measured = [r for r in run.study.records if r.state in ("complete", "screened")]
    likely = sorted(measured, key=lambda record: _likely_loss(run, record))
    starts = list(islice((record for record in likely if _plan(run, record)), STARTS))
    if not starts:
        raise MeasurementError("no trial was measured whose edit could be refined")
    checks = [refiner.evaluate(_plan(run, record)) for record in starts]
    start, check = min(zip(starts, checks, strict=True), key=lambda pair: pair[1].loss)
    return _Aim(start, run.settings.refinement.mass_limit, check)


def _refine_once(
    run: RunParts, refiner: Refiner, aim: _Aim, seconds: float, deadline: float
) -> list[TrialRecord]:
    """Learn one edit; its trial, and those of its other strengths that were measured."""
    table, begun = run.settings.refinement, time.perf_counter()
    options = RefineOptions(
        steps=table.steps,
        form=table.form,
        rank=table.rank,
        mass_limit=aim.mass_limit,
        seed=run.settings.seed + len(run.study.refined),
        seconds=seconds,
        last=len(run.study.refined) + 1 == table.trials,
    )
    if table.beta_kl is not None:
        options = options.weighted(table.beta_kl)
    start = _plan(run, aim.start)
    if table.form != "factors" and not removes_single_directions(start):
        run.tell.notice("factors are learned: at some sites the edit removes several directions")
        options = replace(options, form="factors")
    refined = refiner.refine(
        start,
        options,
        evaluated=aim.evaluated,
        tell=lambda check: run.tell.advance("refine", _note(check)),
    )
    best, *others = _at_best_strength(run, refined.plan, deadline)
    refinement = Refinement(
        sha256="",
        start=aim.start.number,
        steps=refined.steps,
        form=options.form,
        rank=max(operator.rank for operator in refined.plan.values()),
        mass_limit=aim.mass_limit,
        asked=LearningSettings(**table.learning, seed=options.seed),
    )
    seconds = time.perf_counter() - begun - sum(other.seconds for other in others)
    record = _add(run, refiner, aim.start, refinement, replace(best, seconds=seconds))
    records = [record, *(_add_strength(run, refiner, record, other) for other in others)]
    run.response_log.forget()  # of a strength that could not be measured
    run.tell.notice(_comparison(record, record.scores.get(run.suite.limited), refined, best.factor))
    return records


def _add_strength(
    run: RunParts, refiner: Refiner, learned: TrialRecord, other: AtStrength[_Measured]
) -> TrialRecord:
    """A trial of another strength of a learned edit; its factor is of the edit as learned."""
    assert learned.refinement is not None
    refinement = replace(learned.refinement, of=learned.number)
    start = next(r for r in run.study.records if r.number == refinement.start)
    return _add(run, refiner, start, refinement, other)


def _add(
    run: RunParts,
    refiner: Refiner,
    start: TrialRecord,
    refinement: Refinement,
    measured: AtStrength[_Measured],
) -> TrialRecord:
    """Keep the operators and add the trial, with what rung 1 says where the study's trials do."""
    plan, scores = measured.outcome
    outcome: Mapping[str, Score] | Screened = scores
    if predicted := start.predicted.keys():
        mass = float(refiner.refusal_mass(plan).mean())
        outcome = Screened(scores, dict.fromkeys(predicted, mass), promoted=True)
    stored = replace(refinement, sha256=run.plans.save(plan), strength=measured.factor)
    record = run.study.add_refined(start, stored, outcome, measured.seconds)
    run.response_log.write(record.number, plan, "validation", run.suite)
    return record


def _at_best_strength(run: RunParts, plan: Plan, deadline: float) -> list[AtStrength[_Measured]]:
    """A learned edit at the strengths that were measured, the best one first.

    Once one meets the target, a third of the measurements that there was time for are left to
    weaker strengths. An edit that misses it is picked by nobody, so it is made stronger first.
    """
    first = _measure(run, plan, 1.0)
    seconds, left = _measuring_seconds(run), deadline - time.perf_counter()
    if math.isfinite(left):
        seconds *= min(len(WEAKER), max(0, int(left / max(1e-9, 3 * seconds))))
    return best_strength(
        first,
        run.settings.target_refusals,
        lambda factor: _measure(run, plan, factor),
        lambda met: _in_time(run, deadline - (seconds if met else 0.0)),
        lambda error: run.tell.notice(f"no other strength of the edit is measured: {error}"),
    )


def _measure(run: RunParts, plan: Plan, factor: float) -> AtStrength[_Measured]:
    """The objectives of an edit at a multiple of its strength."""
    begun = time.perf_counter()
    scaled = plan if factor == 1 else {k: op.strengthened(factor) for k, op in plan.items()}
    (scores,) = run.suite.evaluate_objectives(run.response_log.engine, [scaled], rivals=())
    assert not isinstance(scores, Stopped)  # nothing races against it
    return _at_strength(run, scores, factor, scaled, time.perf_counter() - begun)


def _at_strength(
    run: RunParts, scores: Mapping[str, Score], factor: float, plan: Plan, seconds: float = 0.0
) -> AtStrength[_Measured]:
    refusals = _likely_refusals(scores.get(run.suite.limited), run.settings.target_refusals)
    return AtStrength(factor, refusals, _damage(run, scores), (plan, scores), seconds)


def _in_time(run: RunParts, deadline: float) -> bool:
    """Whether there is time to measure one more edit, and all processes say so."""
    return from_first(lambda: deadline - time.perf_counter()) > _measuring_seconds(run)


def _likely_refusals(score: Score | None, target: float) -> float:
    """As the default pick counts them; the target where nothing says more.

    Where no response refuses, the target is met, however few there are.
    """
    likely = None if score is None else likely_value(score)
    if score is None or likely is None:
        return target
    return likely if score.value else min(likely, target)


def _next_aim(run: RunParts, refiner: Refiner, record: TrialRecord) -> _Aim:
    """Scale the limit by how far refusals, as the default pick counts them, are from the target."""
    assert record.refinement is not None
    score, factor = record.scores.get(run.suite.limited), 1.0
    if score is not None and score.value is not None:
        likely = (likely_value(score) or 0.0) if score.value else 0.0
        factor = max(TIGHTER, min(LOOSER, run.settings.target_refusals / max(likely, 1e-9)))
    limit = record.refinement.mass_limit * factor
    if (strength := record.refinement.strength) != 1:
        # What it was aimed at would be that much more or less at the strength that was kept.
        limit *= _mass(run, refiner, record) / _mass(run, refiner, record, 1 / strength)
    return _Aim(record, min(HIGHEST_MASS_LIMIT, max(LOWEST_MASS_LIMIT, limit)))


def _mass(run: RunParts, refiner: Refiner, record: TrialRecord, factor: float = 1.0) -> float:
    """Mean refusal mass of a trial's edit at a multiple of its strength."""
    plan = {key: op.strengthened(factor) for key, op in _plan(run, record).items()}
    return max(1e-9, float(refiner.refusal_mass(plan).mean()))


def _likely_loss(run: RunParts, record: TrialRecord) -> tuple[float, float]:
    """Orders trials as the loss of refinement probably does, by what is known of them."""
    damage = _damage(run, record.scores)
    mass = record.predicted.get(run.suite.limited)
    if mass is None:
        return float(_refused(run, record) > run.settings.target_refusals), damage
    options = RefineOptions()
    hinge = max(0.0, math.log(max(mass, 1e-9) / options.threshold))
    return damage + options.multiplier * hinge, damage


def _damage(run: RunParts, scores: Mapping[str, Score]) -> float:
    """The largest of the other objectives that are minimized; divergences alone, if there are any.

    Shares and nats are no common scale.
    """
    values = {
        spec.name: score.optimized or 0.0
        for spec in run.suite.objectives
        if spec.role == "minimize"
        and spec.name != run.suite.limited
        and (score := scores.get(spec.name))
    }
    nats = [value for name, value in values.items() if run.suite.scorers[name].unit == "nats"]
    return max(nats or values.values(), default=0.0)


def _refused(run: RunParts, record: TrialRecord) -> float:
    """Share of responses that refuse; 0 where they are not counted."""
    score = record.scores.get(run.suite.limited)
    return 0.0 if score is None or score.value is None else score.value


def _plan(run: RunParts, record: TrialRecord) -> Plan:
    assert record.edit is not None  # of a complete trial
    return run.plan(record.edit)


def _measuring_seconds(run: RunParts) -> float:
    """What measuring one more edit may take: as long as the longest trial did."""
    return max((r.seconds for r in run.study.records if not r.refinement), default=0.0)


def _learning_seconds(run: RunParts, left: float) -> float:
    """Of the time that is left, without that of measuring the edit, at other strengths too."""
    measuring = _measuring_seconds(run)
    if not math.isfinite(left) or not measuring:
        return left - measuring
    others = min(MEASUREMENTS + len(WEAKER), int(SHARE_OF_STRENGTHS * left / measuring))
    return left - (1 + others) * measuring


def _deadline(run: RunParts) -> float:
    minutes = run.settings.minutes
    return float("inf") if minutes is None else run.begun + minutes * 60


def _note(check: Check) -> str:
    terms = f"step {check.step}: KL {check.kl:.4f}, refusal mass {check.mass:.3f}"
    return f"{terms}, {check.refused:.0%} of training prompts refused"


def _comparison(record: TrialRecord, score: Score | None, refined: Refined, factor: float) -> str:
    """What the smooth term says and what responses say, side by side."""
    first, best = refined.checks[0], refined.best
    counted = "" if score is None else f", responses: {score.text}"
    if factor != 1 and score is not None:
        counted = f", responses at {factor:.2f} times that strength: {score.text}"
    return (
        f"trial {record.number}: validation KL {first.kl:.4f} -> {best.kl:.4f} nats, probability "
        f"of opening with a refusal {first.mass:.1%} -> {best.mass:.1%}{counted}"
    )
