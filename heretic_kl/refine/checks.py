"""What is known of an edit on validation prompts, and which edit is the best so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from heretic_kl.ablation import Plan
from heretic_kl.ranks import from_first
from heretic_kl.refine.objective import Refusal

STRENGTHENINGS = 2
"""Most times that an edit of smaller KL, which exceeds the limit, is made stronger at the end."""
NEAR = 2.0
"""It exceeds the limit by this factor at most."""
EXPONENT = 1.5
"""Refusal mass falls at least with this power of the strength, nearly (3.3 around a learned edit of
the demo model, 1.2 of Qwen2.5-Coder-0.5B): too much costs little KL, too little loses the edit."""


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

    @property
    def loss(self) -> float:
        """What a step minimizes, at this threshold and multiplier, nats; infinite if not finite."""
        loss = self.kl + self.multiplier * self.hinge
        return loss if math.isfinite(loss) else math.inf

    def violation(self, limit: float) -> float:
        """By how much mass or responses exceed a limit; 0 where neither does.

        Infinite where the terms are not finite.
        """
        finite = math.isfinite(self.mass) and math.isfinite(self.kl)
        return max(0.0, self.refusal - limit) if finite else math.inf


class Reread(NamedTuple):
    """What a candidate says to some harmful training prompts."""

    refusals: Sequence[Refusal] = ()
    asked: int = 0

    @property
    def share(self) -> float:
        """Of refusals; 0 where nothing was asked."""
        return len(self.refusals) / max(1, self.asked)


class BestEdit:
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
