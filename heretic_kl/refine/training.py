"""Learns an edit: minimises KL on harmless prompts under a constraint on refusal mass.

The constraint is met on validation prompts: the threshold of the training hinge follows what they
have, and the multiplier follows the hinge (dual ascent). Generates nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from heretic_kl.ablation import Plan
from heretic_kl.errors import MeasurementError
from heretic_kl.model import Architecture, edited
from heretic_kl.ranks import from_first
from heretic_kl.refine.objective import Example, Objective, Refusal, minibatches
from heretic_kl.refine.parameters import Form, LearnableEdit

LOWEST_THRESHOLD = 0.01
LOWERED, RAISED = 0.5, 1.5
"""Least and most that the threshold is multiplied by at a check."""
AIMED_AT = 0.8
"""Share of the limit that the threshold steers to."""
STRENGTHENINGS = 2
"""Most times that an edit of smaller KL, which exceeds the limit, is made stronger at the end."""
NEAR = 2.0
"""It exceeds the limit by this factor at most."""
EXPONENT = 1.5
"""Refusal mass falls at least with this power of the strength, nearly (3.3 around a learned edit of
the demo model, 1.2 of Qwen2.5-Coder-0.5B): too much costs little KL, too little loses the edit."""
FIRST_THRESHOLD = 6.0
"""Where the threshold starts, in mass limits: checks are too few to come down to a low one."""
MULTIPLIER_RANGE = (1e-3, 10.0)
TIMED_STEPS = 5
"""Steps after which the time of the others is estimated."""
CHECKED_AT_ONCE = 32
"""Prompts of one pass without gradients."""
NOTHING_TO_LEARN_FROM = (
    "nothing to learn from: refining needs harmless prompts that the model answers and "
    "harmful ones that it refuses"
)


@dataclass(frozen=True)
class RefineOptions:
    """How an edit is learned."""

    steps: int = 100
    form: Form = "direction"
    rank: int = 1
    harmless_per_step: int = 8
    harmful_per_step: int = 4
    refusals_per_step: int = 2
    """Refusals by the candidate itself, as it last responded to training prompts."""
    mass_limit: float = 0.05
    """Largest mean probability of opening with a refusal, on validation prompts, and largest share
    of refusals among the candidate's responses to training prompts."""
    threshold: float = 0.3
    """The hinge `relu(log mass - log threshold)` is zero below it; at most. Checks lower and raise
    it, so that validation prompts come near the limit."""
    multiplier: float = 0.1
    """Weight of the hinge beside the KL in nats, where it starts."""
    slack: float = 0.05
    """Nats of mean hinge on training prompts at which the multiplier stays as it is."""
    dual_rate: float = 0.02
    """Largest relative change of the multiplier in a step; 0: it stays, the plain weighted form."""
    direction_rate: float = 6e-3
    strength_rate: float = 0.03
    warmup: int = 10
    average: float = 0.9
    """Decay of the moving average of the parameters, which is what is kept."""
    check_every: int = 20
    seed: int = 0
    seconds: float = math.inf
    """Fewer steps are taken where all of them and their checks would take longer."""
    last: bool = False
    """No other refinement follows. Then, or where the time is too short for all steps of another
    one, up to twice as many steps are taken as fit in the time."""

    def weighted(self, beta_kl: float) -> RefineOptions:
        """The plain weighted form `beta_kl * KL + hinge` with both weights fixed."""
        return replace(self, multiplier=1 / beta_kl, dual_rate=0.0)


@dataclass(frozen=True)
class Prompts:
    """What one use of prompts gives the objective."""

    harmless: Sequence[Example]
    harmful: Sequence[tuple[int, ...]]  # token ids


class Check(NamedTuple):
    """The terms on validation prompts."""

    step: int
    kl: float  # nats, mean over positions, then prompts
    kl_error: float  # standard error over prompts
    mass: float  # mean probability of opening with a refusal
    refused: float  # share of the candidate's responses to training prompts; 0: not asked
    hinge: float  # nats, mean over prompts, at the threshold
    threshold: float
    multiplier: float
    seconds: float

    @property
    def refusal(self) -> float:
        """The larger of refusal mass and the share of refusals among responses."""
        return max(self.mass, self.refused)

    def violation(self, limit: float) -> float:
        """By how much mass or responses exceed a limit; 0 where neither does."""
        return max(0.0, self.refusal - limit)


class Reread(NamedTuple):
    """What a candidate says to some harmful training prompts."""

    refusals: Sequence[Refusal] = ()
    asked: int = 0

    @property
    def share(self) -> float:
        """Of refusals; 0 where nothing was asked."""
        return len(self.refusals) / max(1, self.asked)


@dataclass(frozen=True)
class Refined:
    """A learned edit and how it came about."""

    plan: Plan
    checks: tuple[Check, ...]
    """The first one is the start's."""
    best: Check
    """The kept one."""

    @property
    def steps(self) -> int:
        """Steps taken; where time is limited, fewer or more than asked for."""
        return self.checks[-1].step


def refine(
    start: Plan,
    architecture: Architecture,
    objective: Objective,
    train: Prompts,
    validation: Prompts,
    options: RefineOptions,
    *,
    tell: Callable[[Check], None] = lambda check: None,
    reread: Callable[[Plan], Reread] = lambda plan: Reread(),
) -> Refined:
    """Learn an edit from a start; what is returned is never worse than it on validation prompts.

    Better is: a smaller violation of the limit, by mass or responses, then a smaller KL. At the end
    an edit of smaller KL that exceeds the limit by little is made stronger, to meet it.

    Args:
        start: the plan to begin at.
        architecture: of the model.
        objective: computes the terms.
        train: prompts for gradients.
        validation: other prompts, to stop early and to set the threshold by.
        options: how to learn.
        tell: told of every check, the start's included.
        reread: has a candidate respond; may replace the objective's openings by what it says.

    Raises:
        ValueError: see `LearnableEdit`.
        MeasurementError: there is nothing to learn from, or the loss is not finite.
    """
    learner = _Learner(start, architecture, objective, train, options)
    begun = time.perf_counter()
    checks: list[Check] = []

    def check(plan: Plan, step: int) -> Check:
        now = replace(options, threshold=learner.threshold, multiplier=learner.multiplier)
        terms = evaluate(objective, architecture, plan, validation, now)
        said = reread(plan)
        learner.refusals = said.refusals
        checks.append(terms._replace(step=step, refused=said.share, seconds=_seconds_since(begun)))
        tell(checks[-1])
        return checks[-1]

    edits, step = _Kept(check(start, 0), start, options.mass_limit), 0
    while (step := step + 1) <= learner.steps:
        learner.step()
        if step == TIMED_STEPS:
            learner.fit_time(step, _seconds_since(begun), checks[0].seconds)
        if step % options.check_every and step != learner.steps:
            continue
        plan = learner.averaged()
        edits.add(check(plan, step), plan)
        if step < learner.steps:
            learner.adjust(checks[-1])
            learner.fit_time(step, _seconds_since(begun), checks[0].seconds)
    for _ in range(STRENGTHENINGS):
        in_time = _seconds_since(begun) + checks[0].seconds <= options.seconds
        if in_time and (stronger := edits.strengthened()):
            edits.add(check(stronger, step - 1), stronger)
    return Refined(edits.plan, tuple(checks), edits.best)


class _Kept:
    """The best edit so far, and one of smaller KL that exceeds the limit by little."""

    def __init__(self, start: Check, plan: Plan, limit: float) -> None:
        self.best, self.plan = start, plan
        self._limit = limit
        self._near: tuple[Check, Plan] | None = None

    def add(self, check: Check, plan: Plan) -> None:
        """Compare one more."""
        if self._order(check) < self._order(self.best):
            self.best, self.plan = check, plan
        over = check.refusal / self._limit
        if 1 < over <= NEAR and (self._near is None or check.kl < self._near[0].kl):
            self._near = check, plan

    def strengthened(self) -> Plan | None:
        """The one over the limit, made so much stronger that it may meet it; None: no need."""
        factor = from_first(self._factor)  # processes that hold one model must agree
        plan = self.plan if self._near is None else self._near[1]
        self._near = None
        return (
            {k: operator.strengthened(factor) for k, operator in plan.items()} if factor else None
        )

    def _factor(self) -> float:
        """By which to strengthen; 0: not."""
        if self._near is None:
            return 0.0
        check, _ = self._near
        if check.kl >= self.best.kl and not self.best.violation(self._limit):
            return 0.0
        return 1.01 * float((check.refusal / self._limit) ** (1 / EXPONENT))

    def _order(self, check: Check) -> tuple[float, float]:
        return check.violation(self._limit), check.kl


def _seconds_since(begun: float) -> float:
    """By the clock of the first of several processes with one model."""
    return from_first(lambda: time.perf_counter() - begun)


class _Learner:
    """Parameters, optimiser and multiplier."""

    def __init__(
        self,
        start: Plan,
        architecture: Architecture,
        objective: Objective,
        train: Prompts,
        options: RefineOptions,
    ) -> None:
        if not train.harmless or not train.harmful:
            raise MeasurementError(NOTHING_TO_LEARN_FROM)
        self._edit = LearnableEdit(start, options.form, rank=options.rank, seed=options.seed)
        for key, operator in self._edit.plan.items():
            operator.to(architecture.site(key).device)  # in place, before anything reads it
        self._architecture = architecture
        self._objective = objective
        self._train = train
        self._options = options
        self.steps = options.steps
        self._most: int | None = None
        self.threshold = min(options.threshold, FIRST_THRESHOLD * options.mass_limit)
        self.multiplier = options.multiplier
        self.refusals: Sequence[Refusal] = ()
        self._hinge: float | None = None
        groups = self._edit.groups(options.direction_rate, options.strength_rate)
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self._average = AveragedModel(
            self._edit,
            multi_avg_fn=get_ema_multi_avg_fn(options.average),  # type: ignore[no-untyped-call]
        )
        self._draw = order = random.Random(options.seed)
        self._harmless = minibatches(len(train.harmless), options.harmless_per_step, order)
        self._harmful = minibatches(len(train.harmful), options.harmful_per_step, order)

    def step(self) -> None:
        """One step of the optimiser and of the multiplier."""
        harmless = [self._train.harmless[index] for index in next(self._harmless)]
        harmful = [self._train.harmful[index] for index in next(self._harmful)]
        with torch.enable_grad(), edited(self._architecture, self._edit.plan):
            terms = self._objective.terms(harmless, harmful, self._some_refusals())
            excess = terms.log_mass - math.log(self.threshold)
            excess_of_refusals = terms.log_refusals - math.log(LOWEST_THRESHOLD)
            hinge = torch.relu(torch.cat([excess, excess_of_refusals])).mean()
            loss = terms.kl.mean() + self.multiplier * hinge
            if not torch.isfinite(loss):
                raise MeasurementError(
                    "the loss of the refinement is not finite: try --dtype float32"
                )
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self._average.update_parameters(self._edit)
        self._ascend(float(hinge.detach()))

    def _some_refusals(self) -> list[Refusal]:
        count = min(self._options.refusals_per_step, len(self.refusals))
        return self._draw.sample(list(self.refusals), count)

    def adjust(self, check: Check) -> None:
        """Move the threshold by how far a check is from what is aimed at."""
        aim = AIMED_AT * self._options.mass_limit
        factor = min(RAISED, max(LOWERED, aim / max(check.refusal, 1e-9)))
        highest = self._options.threshold
        self.threshold = min(highest, max(LOWEST_THRESHOLD, self.threshold * factor))

    def fit_time(self, step: int, elapsed: float, check_seconds: float) -> None:
        """Change the number of steps to what fits in the time, by those taken so far.

        Before the first check the time of one is added to that of steps. Whether there may be more
        steps than asked for is decided once, so that the schedule does not jump.
        """
        options = self._options
        per_step = (elapsed - check_seconds) / step
        if step < options.check_every:
            per_step += check_seconds / options.check_every
        last_checks = 2 * check_seconds  # the last one, and one more where it exceeds the limit
        fitting = step + (options.seconds - elapsed - last_checks) / max(per_step, 1e-9)
        if self._most is None:
            room = math.isfinite(fitting) and (options.last or fitting < 2 * options.steps)
            self._most = (2 if room else 1) * options.steps
        self.steps = int(max(step, min(self._most, fitting)))

    def averaged(self) -> Plan:
        """The averaged parameters as a plan."""
        module = self._average.module
        assert isinstance(module, LearnableEdit)
        return module.frozen()

    def _ascend(self, hinge: float) -> None:
        """Multiplicative dual ascent on the moving mean of the hinge; a fixed weight stays."""
        if not self._options.dual_rate:
            return
        mean = hinge if self._hinge is None else 0.9 * self._hinge + 0.1 * hinge
        self._hinge = mean
        slack = self._options.slack
        push = math.log((mean + 0.1 * slack) / slack)
        self.multiplier *= math.exp(self._options.dual_rate * max(-1.0, min(1.0, push)))
        self.multiplier = min(max(self.multiplier, MULTIPLIER_RANGE[0]), MULTIPLIER_RANGE[1])

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to a twentieth."""
        options = self._options
        warm = min(1.0, (step + 1) / max(1, options.warmup))
        return warm * (0.525 + 0.475 * math.cos(math.pi * min(1.0, step / self.steps)))


@torch.no_grad()
def evaluate(
    objective: Objective,
    architecture: Architecture,
    plan: Plan,
    prompts: Prompts,
    options: RefineOptions,
) -> Check:
    """The terms of an edit on some prompts; step and seconds are 0."""
    divergences: list[Tensor] = []
    masses: list[Tensor] = []
    with edited(architecture, plan):
        for first in range(0, len(prompts.harmless), CHECKED_AT_ONCE):
            some = prompts.harmless[first : first + CHECKED_AT_ONCE]
            divergences.append(objective.terms(some, []).kl)
        for first in range(0, len(prompts.harmful), CHECKED_AT_ONCE):
            others = prompts.harmful[first : first + CHECKED_AT_ONCE]
            masses.append(objective.terms([], others).log_mass)
    kl, log_mass = torch.cat(divergences).double(), torch.cat(masses).double()
    mass = log_mass.exp()
    return Check(
        step=0,
        kl=float(kl.mean()),
        kl_error=float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else math.inf,
        mass=float(mass.mean()),
        refused=0.0,
        hinge=float(torch.relu(log_mass - math.log(options.threshold)).mean()),
        threshold=options.threshold,
        multiplier=options.multiplier,
        seconds=0.0,
    )
