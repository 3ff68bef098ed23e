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

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from heretic_kl.ablation import Plan
from heretic_kl.errors import MeasurementError
from heretic_kl.model import Architecture, edited
from heretic_kl.ranks import from_first
from heretic_kl.refine.checks import STRENGTHENINGS, BestEdit, Check, Reread
from heretic_kl.refine.objective import Example, Objective, Refusal, minibatches
from heretic_kl.refine.parameters import Form, LearnableEdit

LOWEST_THRESHOLD = 0.01
LOWERED, RAISED = 0.5, 1.5
"""Least and most that the threshold is multiplied by at a check."""
AIMED_AT = 0.8
"""Share of the limit that the threshold steers to."""
FIRST_THRESHOLD = 6.0
"""Where the threshold starts, in mass limits: checks are too few to come down to a low one."""
MULTIPLIER_RANGE = (1e-3, 10.0)
STEPS_OF_RATES = 100
"""Steps for which the learning rates are; with fewer they grow in proportion."""
HIGHEST_RATE = 2.0
"""Times the learning rate, at most."""
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
    """Steps with a rate that rises; a tenth of all steps, at most."""
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
    evaluated: Check | None = None,
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
        evaluated: the start's terms on the validation prompts, if they are known.
        tell: told of every check, the start's included.
        reread: has a candidate respond; may replace the objective's openings by what it says.

    Raises:
        ValueError: see `LearnableEdit`.
        MeasurementError: there is nothing to learn from, or the loss is not finite before the
            first check. Later that ends the steps.
    """
    learner = _Learner(start, architecture, objective, train, options)
    check = _Checker(learner, validation, tell, reread)
    edits, step = BestEdit(check(start, 0, evaluated), start, options.mass_limit), 0
    first = check.made[0].seconds
    one_check = first + (evaluated.seconds if evaluated else 0.0)
    while (step := step + 1) <= learner.steps:
        try:
            learner.step()
        except MeasurementError:
            if len(check.made) == 1:
                raise
            break  # what earlier checks hold is finite
        if step == TIMED_STEPS:
            learner.fit_time(step, check.elapsed, first, one_check)
        if not learner.is_checked(step):
            continue
        plan = learner.averaged()
        edits.add(check(plan, step), plan)
        if step < learner.steps:
            learner.adjust(check.made[-1])
            learner.fit_time(step, check.elapsed, first, one_check)
    for _ in range(STRENGTHENINGS):
        in_time = check.elapsed + one_check <= options.seconds
        if in_time and (stronger := edits.strengthened()):
            edits.add(check(stronger, step - 1), stronger)
    return Refined(edits.plan, tuple(check.made), edits.best)


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
        some = [refusal for refusal in self.refusals if refusal.response]  # an empty one has none
        return self._draw.sample(some, min(self._options.refusals_per_step, len(some)))

    def adjust(self, check: Check) -> None:
        """Move the threshold by how far a check is from what is aimed at, unless weights stay."""
        if not self._options.dual_rate:
            return
        aim = AIMED_AT * self._options.mass_limit
        factor = min(RAISED, max(LOWERED, aim / max(check.refusal, 1e-9)))
        highest = self._options.threshold
        self.threshold = min(highest, max(LOWEST_THRESHOLD, self.threshold * factor))

    def is_checked(self, step: int) -> bool:
        """Whether a check follows a step: not shortly before the last one, which has its own."""
        left, every = self.steps - step, self._options.check_every
        return left <= 0 or (step % every == 0 and left >= every)

    def fit_time(self, step: int, elapsed: float, first: float, one_check: float) -> None:
        """Change the number of steps to what fits in the time, by those taken so far.

        Before the first check the time of one is added to that of steps. Whether there may be more
        steps than asked for is decided once, so that the schedule does not jump.

        Args:
            step: taken so far.
            elapsed: seconds since the start.
            first: seconds of these before the first step.
            one_check: seconds of a check.
        """
        options = self._options
        per_step = (elapsed - first) / step
        if step < options.check_every:
            per_step += one_check / options.check_every
        last_checks = 2 * one_check  # the last one, and one more where it exceeds the limit
        fitting = step + (options.seconds - elapsed - last_checks) / max(per_step, 1e-9)
        if self._most is None:
            room = math.isfinite(fitting) and (options.last or fitting < 2 * options.steps)
            self._most = (2 if room else 1) * options.steps
        self.steps = int(max(step, min(self._most, fitting)))

    def evaluate(self, plan: Plan, prompts: Prompts) -> Check:
        """The terms of an edit, at the present threshold and multiplier."""
        now = replace(self._options, threshold=self.threshold, multiplier=self.multiplier)
        return evaluate(self._objective, self._architecture, plan, prompts, now)

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
        """Linear warm-up, then a cosine to a twentieth; the fewer the steps, the larger."""
        warmup = min(self._options.warmup, self.steps // 10)
        warm = min(1.0, (step + 1) / max(1, warmup))
        more: float = min(HIGHEST_RATE, max(1.0, STEPS_OF_RATES / self.steps))
        return more * warm * (0.525 + 0.475 * math.cos(math.pi * min(1.0, step / self.steps)))


class _Checker:
    """Makes checks of what a learner has learned, and gives it the refusals that they find."""

    def __init__(
        self,
        learner: _Learner,
        validation: Prompts,
        tell: Callable[[Check], None],
        reread: Callable[[Plan], Reread],
    ) -> None:
        self._learner = learner
        self._validation = validation
        self._tell = tell
        self._reread = reread
        self._begun = time.perf_counter()
        self.made: list[Check] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the start, by the clock of the first of processes with one model."""
        return from_first(lambda: time.perf_counter() - self._begun)

    def __call__(self, plan: Plan, step: int, terms: Check | None = None) -> Check:
        """Evaluate an edit, unless its terms are known, and read its responses."""
        terms = terms or self._learner.evaluate(plan, self._validation)
        said = self._reread(plan)
        self._learner.refusals = said.refusals
        self.made.append(terms._replace(step=step, refused=said.share, seconds=self.elapsed))
        self._tell(self.made[-1])
        return self.made[-1]


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
