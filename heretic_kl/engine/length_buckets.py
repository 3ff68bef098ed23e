"""Sequences grouped by length, so that little is computed for padding. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

SMALLEST_BUCKET = 4
"""Below this many rows padding is cheaper than another pass."""


def length_buckets(
    lengths: Sequence[int], max_rows: int, *, max_padding: float = 0.1
) -> list[list[int]]:
    """Indices grouped so that each group has similar lengths, shortest group first.

    The grouping depends on nothing but the lengths: reference and candidate always run in the
    same batches.

    Args:
        lengths: tokens of each sequence.
        max_rows: most sequences in a group.
        max_padding: share of padded positions above which a group of `SMALLEST_BUCKET` or more
            is closed.

    Raises:
        ValueError: `max_rows` is below 1.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    groups: list[list[int]] = []
    current: list[int] = []
    real = 0
    for index in order:
        padded = lengths[index] * (len(current) + 1)
        waste = 1 - (real + lengths[index]) / padded if padded else 0.0
        full = len(current) >= max_rows
        if current and (full or (waste > max_padding and len(current) >= SMALLEST_BUCKET)):
            groups.append(current)
            current, real = [], 0
        current.append(index)
        real += lengths[index]
    if current:
        groups.append(current)
    return groups
