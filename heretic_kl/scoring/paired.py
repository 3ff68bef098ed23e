"""Whether a candidate measured on some prompts is worse than a rival measured on all of them.

t tests on a few prompts out of P. Knows neither scorers nor results.

The assumption: the prompts that come first stand for the rest. Their order is fixed before any
candidate is known, and how much two candidates differ on a prompt does not go with its place in
that order. A t test is approximate; what it is wrong about most, values that lean to one side, is
met by erring on the other (see `worse_than`, `above_zero`, and the simulations among the tests).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from heretic_kl.scoring.scorer import PerPrompt

LOOKS = 3
"""Most times that one objective of one candidate is tested; the error is divided by it."""
FEWEST_PROMPTS = 8
"""With fewer no standard error is trusted."""
DIGITS = 7
"""What is kept of each value; enough for a difference, and short in storage."""


class Difference(NamedTuple):
    """How much more the candidate has than the rival, per prompt on average."""

    mean: float
    standard_error: float
    """Over the prompts not yet measured: 0 once all are."""
    tail: float
    """Chance of so large a difference or a larger one where the true one is 0 or less."""


class Standing(NamedTuple):
    """A rival's objective and its parts, in the scorer's unit."""

    objective: float
    """The mean over all prompts, or the floor."""
    values: tuple[float, ...]
    """All P, of `PerPrompt`'s order."""


def look_is_due(measured: int, total: int, before: int) -> bool:
    """Whether to test again: a quarter of all prompts is new, and not all are there.

    Args:
        measured: n.
        total: P.
        before: n at the last look, 0 if there was none; so there are `LOOKS` at most.
    """
    return FEWEST_PROMPTS <= measured < total and measured - before >= total / (LOOKS + 1)


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """To `DIGITS` significant digits: what is stored and what is compared with it."""
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)


def worse_than(found: PerPrompt, rival: Standing, *, maximize: bool = False) -> Difference:
    """How much worse the candidate's objective is than the rival's, and how surely.

    Two tests, and the less sure one counts. In pairs, prompt by prompt: it holds where the prompts
    measured first are harder than the rest for everybody. Against the rival's mean over all
    prompts, which is known: it holds where the rival is bad on a few prompts that are still to
    come, which pairs cannot show.

    The objective is the mean or the floor, whichever is larger. So a candidate is worse than a
    rival at the floor if its mean is above the floor, whatever that rival's own mean is.
    """
    sign = -1.0 if maximize else 1.0
    mine = [sign * value for value in rounded(found.values)]
    whole = above_zero([value - sign * rival.objective for value in mine], found.total)
    if rival.objective <= found.floor:
        # Where more is better, nothing is less than the floor.
        return whole._replace(tail=1.0) if maximize else whole
    theirs = [sign * rival.values[prompt] for prompt in found.prompts]
    pairs = above_zero([a - b for a, b in zip(mine, theirs, strict=True)], found.total)
    return pairs._replace(tail=max(pairs.tail, whole.tail))


def above_zero(values: Sequence[float], total: int) -> Difference:
    """The mean of n of P values, tested against 0 or less with Student's t.

    The standard error is that of a draw without replacement: (s / sqrt(n)) sqrt(1 - n / P). Where
    the values lean to the left, so that a few low ones may still be to come, the mean is corrected
    for it (Hall 1992, a cubic that keeps the order); never upwards. Values that are all alike say
    nothing of how much they vary: tail 1.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 3:
        return Difference(mean, math.inf, 1.0)
    variance = math.fsum((each - mean) ** 2 for each in values) / (count - 1)
    error = math.sqrt(variance / count * (1.0 - count / total))
    if not error > 0.0:
        return Difference(mean, error, 1.0)
    spread = math.sqrt(variance)
    third = math.fsum((each - mean) ** 3 for each in values) * count / ((count - 1) * (count - 2))
    lean, size = third / spread**3, mean / spread
    change = lean * size**2 / 3 + lean**2 * size**3 / 27 + lean / (6 * count)
    corrected = mean + spread * min(0.0, change)
    return Difference(mean, error, student_tail(corrected / error, count - 1))


def student_tail(t: float, freedom: int) -> float:
    """P(T > t) of Student's t with a whole number of degrees of freedom.

    The finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4; absolute error about 1e-15.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for below in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (below - 1) / below
        total += term
    inside = 2.0 / math.pi * (angle + sine * total) if odd else sine * total
    tail = min(0.5, max(0.0, (1.0 - inside) / 2.0))
    return tail if t > 0 else 1.0 - tail
