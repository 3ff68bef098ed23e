"""Candidates of one reference in order of their KL, with what they take on disk. Loads nothing."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

from heretic_kl.kl import PairedComparison
from heretic_kl.model import StoredSize, stored_size
from heretic_kl.score.measurement import Measurement


@dataclass(frozen=True)
class RankedCandidate:
    """One line of the ranking."""

    name: str
    measurement: Measurement
    size: StoredSize | None
    """None: it is not on this disk."""
    beyond_best: PairedComparison | None
    """This one minus the best, paired by prompt; None for the best."""
    group: str
    """A letter; those of one group cannot be told from its first, which is the nearest of it."""
    pareto: bool = False
    """None of those whose size is known is as small and nearer, or as near and smaller."""


def rank(names: Sequence[str], measurements: Sequence[Measurement]) -> tuple[RankedCandidate, ...]:
    """Order candidates by their KL, nearest to the reference first.

    Raises:
        MeasurementError: they were not measured on the same positions.
    """
    sizes = [stored_size(name) for name in names]
    ordered = sorted(
        zip(names, measurements, sizes, strict=True),
        key=lambda line: (line[1].kl, math.inf if line[2] is None else line[2].file_bytes),
    )
    best = ordered[0][1] if ordered else None
    ranked: list[RankedCandidate] = []
    first, group = best, 0  # of the group that is being filled
    smallest = math.inf  # of those that are nearer
    for name, measurement, size in ordered:
        assert best is not None and first is not None
        if measurement is not first and measurement.compare(first).distinguishable:
            first, group = measurement, group + 1
        beyond_best = None if measurement is best else measurement.compare(best)
        letter = string.ascii_lowercase[group % 26] * (1 + group // 26)
        on_line = size is not None and size.file_bytes < smallest
        smallest = smallest if size is None else min(smallest, size.file_bytes)
        ranked.append(RankedCandidate(name, measurement, size, beyond_best, letter, on_line))
    return tuple(ranked)
