"""Strengths of a learned edit: where it just meets the target, and weaker ones for the front.

Measuring an edit takes a small part of the time of learning one, and the limit on refusal mass
that an edit was learned under foretells its refusals only roughly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from heretic_kl.errors import HereticKLError

MEASUREMENTS = 3
"""Of one edit at other strengths, at most; as many again while none meets the target."""
STEEPEST, FLATTEST = 3.0, 1.5
"""Refusals change about with a power of the strength between these."""
NEAREST = 0.97
"""No strength is measured that is nearer than this factor to one that meets the target."""
WEAKEST, STRONGEST = 0.6, 1.5
"""Factors between one measurement and the next, at most."""
WEAKER = (0.5, 0.7, 0.35)
"""Of the strength that meets the target; measured last, for people who accept more refusals. Where
time is short, the first ones."""
LEAST_STRONGER = 1.06
"""By less, often no response changes; its square the second time, its cube the third time."""

Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class AtStrength(Generic[Outcome]):
    """An edit, measured at a multiple of its strength."""

    factor: float
    refusals: float
    """Share of refusals, in the sense of the target."""
    damage: float
    outcome: Outcome
    seconds: float = 0.0
    """Of measuring it."""

    def order(self, target: float) -> tuple[float, float]:
        """The smaller, the better: first by how far the target is missed, then by damage."""
        return max(0.0, self.refusals - target), self.damage


def best_strength(
    first: AtStrength[Outcome],
    target: float,
    measure: Callable[[float], AtStrength[Outcome]],
    in_time: Callable[[bool], bool] = lambda met: True,
    failed: Callable[[HereticKLError], None] = lambda error: None,
) -> list[AtStrength[Outcome]]:
    """The least damaging strength that meets the target, and the others that were measured.

    Args:
        first: the edit as it was learned.
        target: share of refusals that is acceptable.
        measure: measures the edit at a factor.
        in_time: whether there is time for one more measurement, told whether one meets the target.
        failed: told why one failed; then no other is made.

    Returns:
        All that were measured, `first` included, the best one first; if none meets the target,
        that is the nearest.
    """
    measured = [first]
    while True:
        met = any(one.refusals <= target for one in measured)
        factor = next_factor(measured, target)
        most = MEASUREMENTS if met else 2 * MEASUREMENTS
        if factor is None or len(measured) > most or not in_time(met):
            break
        try:
            measured.append(measure(factor))
        except HereticKLError as error:  # what was measured before stays
            failed(error)
            break
    return sorted(measured, key=lambda one: one.order(target))


def next_factor(measured: list[AtStrength[Outcome]], target: float) -> float | None:
    """Which strength to measure next; None where no other one promises anything."""
    meeting = [one for one in measured if one.refusals <= target]
    missing = [one for one in measured if one.refusals > target]
    weakest = min(meeting, key=lambda one: one.factor, default=None)
    strongest = max(missing, key=lambda one: one.factor, default=None)
    if weakest is None:
        assert strongest is not None  # one of both has something
        power = (strongest.refusals / max(target, 1e-9)) ** (1 / FLATTEST)
        return strongest.factor * float(min(STRONGEST, max(LEAST_STRONGER ** len(missing), power)))
    if strongest is None:
        power = (max(weakest.refusals, 1e-9) / max(target, 1e-9)) ** (1 / STEEPEST)
        factor = weakest.factor * max(WEAKEST, power)
    elif strongest.factor < weakest.factor:
        factor = (strongest.factor * weakest.factor) ** 0.5
    else:  # more refusals where the edit is stronger: responses do not follow the strength
        return None
    return factor if factor < NEAREST * weakest.factor else None
