"""Candidates of one reference in order of their KL, with what they take on disk. Loads nothing."""

from __future__ import annotations

import json
import math
import string
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from heretic_kl.kl import PairedComparison
from heretic_kl.model import ModelSource
from heretic_kl.score.measurement import Measurement

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Of types that store one weight a number; others are packed, several weights to a number."""


class StoredSize(NamedTuple):
    """What a model takes on disk."""

    file_bytes: int
    bits_per_weight: float | None
    """Over all tensors; None: packed in a way that does not show how many weights there are."""


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


def stored_size(name: str) -> StoredSize | None:
    """Measure a GGUF file, or the safetensors of a folder; None: neither is here."""
    source = ModelSource(name)
    if source.gguf_file is not None and source.gguf_file.is_file():
        return _gguf_size(source.gguf_file)
    if source.folder is None:
        return None
    files = sorted(source.folder.glob("*.safetensors"))
    if not files:
        return None
    size = sum(file.stat().st_size for file in files)
    weights = [_weights(file) for file in files]
    if source.adapter is not None or None in weights:
        return StoredSize(size, None)
    count = sum(weight[0] for weight in weights if weight is not None)
    stored = sum(weight[1] for weight in weights if weight is not None)
    return StoredSize(size, 8.0 * stored / count)


def _gguf_size(path: Path) -> StoredSize:
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    stored, count = sum(int(t.n_bytes) for t in tensors), sum(int(t.n_elements) for t in tensors)
    return StoredSize(path.stat().st_size, 8.0 * stored / max(1, count))


def _weights(path: Path) -> tuple[int, int] | None:
    """How many weights a safetensors file has and their bytes; None: some are packed."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    count = stored = 0
    for tensor in header.values():
        if tensor["dtype"] not in _BYTES:
            return None
        start, stop = tensor["data_offsets"]
        stored += stop - start
        count += (stop - start) // _BYTES[tensor["dtype"]]
    return (count, stored) if count else None
