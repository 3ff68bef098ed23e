"""Models made one from another: what each step cost, and whether the costs add. Loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from heretic_kl.kl import PairedComparison, compare_paired, geometric_weights
from heretic_kl.model import DtypeName
from heretic_kl.score.measurement import Measurement
from heretic_kl.score.teacher_forced_kl import TeacherForcedKL
from heretic_kl.score.text import TextKL
from heretic_kl.score.vllm.candidate import ROUNDED


@dataclass(frozen=True)
class ChainPair:
    """One model measured from an earlier one, both by their place in the chain."""

    earlier: int
    later: int
    measurement: Measurement

    @property
    def is_step(self) -> bool:
        """Whether nothing is between them."""
        return self.later == self.earlier + 1

    @property
    def rounded(self) -> bool:
        """Whether the earlier one's logits were held as float16, for want of memory."""
        return (self.measurement.reference_dtype or "").endswith(ROUNDED)


@dataclass(frozen=True)
class ChainMeasurement:
    """Every pair of a chain, over the same sequences: the responses of its first model, or text."""

    pairs: tuple[ChainPair, ...]

    @property
    def whole(self) -> Measurement:
        """The last model measured from the first."""
        return max(self.pairs, key=lambda pair: pair.later - pair.earlier).measurement

    @property
    def sum_of_steps(self) -> float:
        """Nats."""
        return sum(pair.measurement.kl for pair in self.pairs if pair.is_step)

    def beyond_the_steps(self) -> PairedComparison:
        """The whole minus the sum of the steps, paired by prompt; 0 where costs add.

        Above 0 the steps push in the same direction, below 0 a later one takes back some of it.
        """
        steps = [pair.measurement.table for pair in self.pairs if pair.is_step]
        infinite = steps[0].infinite.clone()
        total = steps[0].values.clone()
        for table in steps[1:]:
            total += table.values
            infinite |= table.infinite
        together = replace(steps[0], values=total, infinite=infinite)
        whole = self.whole
        weights = geometric_weights(whole.table.positions, whole.position_decay)
        return compare_paired(whole.table, together, position_weights=weights)


def measure_chain(
    kl: TeacherForcedKL | TextKL,
    models: Sequence[Any],
    measurements: Sequence[Measurement],
    *,
    base: Any = None,
    dtype: DtypeName | None = None,
) -> ChainMeasurement:
    """Measure every model of a chain from every earlier one; one is loaded at a time.

    A model runs in the same dtype wherever it stands in the chain.

    Args:
        kl: of the first model.
        models: those that follow it, in order.
        measurements: `kl.score` of each of them, with the same `base` and `dtype`.
        base: of those that are adapters; see `TeacherForcedKL.score`.
        dtype: of these models; see `TeacherForcedKL.score`.

    Raises:
        HereticKLError: as `kl.score`.
    """
    pairs = [ChainPair(0, later, measured) for later, measured in enumerate(measurements, 1)]
    for earlier in range(1, len(models)):
        seen = kl.seen_by(models[earlier - 1], base=base, dtype=dtype)
        for later in range(earlier + 1, len(models) + 1):
            measured = seen.score(models[later - 1], base=base, dtype=dtype)
            pairs.append(ChainPair(earlier, later, measured))
        del seen  # its logits or its model, before the next one's are there
    return ChainMeasurement(tuple(pairs))
