"""One candidate of a reference, or several: in order, as records, tables and a plot."""

from __future__ import annotations

import csv
import io
import math
import string
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import Self

from heretic_kl.errors import ExportError
from heretic_kl.kl import (
    PairedComparison,
    geometric_weights,
    group_means,
    summarize,
)
from heretic_kl.model import DtypeName, StoredSize, stored_size
from heretic_kl.score.detail import ForcedInputs, PassNotes
from heretic_kl.score.llama.kld_rows import KLDAccumulator
from heretic_kl.score.measurement import Measurement
from heretic_kl.score.stored import StorableReference

COLUMNS = ("group", "candidate", "size MB", "bits/weight", "KL, nats", "beyond the best")
BACK_END_FLOOR = "back-end floor"
PICTURES = (".png", ".svg")


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


@dataclass(frozen=True)
class Comparison:
    """What `TeacherForcedKL.compare` and `TextKL.compare` return.

    pandas.DataFrame(kl.compare(["a.gguf", "b.gguf"]).records())
    """

    ranked: tuple[RankedCandidate, ...]
    """Nearest to the reference first."""

    @classmethod
    def of(cls, names: Sequence[str], measurements: Sequence[Measurement]) -> Comparison:
        """Candidates that were measured on the same positions."""
        return cls(rank(names, measurements))

    def records(self) -> list[dict[str, Any]]:
        """A flat row of plain values for each candidate, for `pandas.DataFrame`; nats."""
        return [_record(candidate) for candidate in self.ranked]

    def cells(self) -> tuple[tuple[str, ...], ...]:
        """A heading and a line of text for each candidate.

        The floor across back ends has a column if it was measured for one of them.
        """
        floors = [candidate.measurement.back_end_floor for candidate in self.ranked]
        if not any(floor is not None for floor in floors):
            return (COLUMNS, *(_line(candidate) for candidate in self.ranked))
        cells = ("–" if floor is None else f"{floor:.2g}" for floor in floors)
        lines = map(_line, self.ranked)
        wide = ((*line[:5], cell, *line[5:]) for line, cell in zip(lines, cells, strict=True))
        return ((*COLUMNS[:5], BACK_END_FLOOR, *COLUMNS[5:]), *wide)

    def to_markdown(self) -> str:
        """A table for a model card."""
        heading, *lines = self.cells()
        rows = [heading, ("---",) * len(heading), *lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

    def to_csv(self) -> str:
        """The records, with all digits."""
        buffer = io.StringIO()
        records = self.records()
        writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return buffer.getvalue()

    def plot(self, path: str | Path) -> None:
        """Draw KL against size on disk, with the Pareto line and the bands.

        Args:
            path: ends in .png or .svg.

        Raises:
            ExportError: the drawing library is not installed, or no candidate's size is known.
            ValueError: `path` ends otherwise.
        """
        from heretic_kl.files import new_file
        from heretic_kl.report import png, size_figure, svg

        target = Path(path)
        if target.suffix.lower() not in PICTURES:
            raise ValueError(f"path must end in .png or .svg, got {str(path)!r}")
        rows = self.points()
        if not rows:
            raise ExportError("no candidate is on this disk: there is no size to plot against")
        drawing = size_figure(rows, self.levels()).drawing
        draw = png if target.suffix.lower() == ".png" else _encoded(svg)
        with new_file(target) as partial:
            partial.write_bytes(draw(drawing))

    def points(self) -> list[dict[str, Any]]:
        """The candidates whose size is known, as rows of the plot."""
        return [
            {
                "name": _short(record["candidate"]),
                "size": record["bytes"] / 1e6,
                "bits": record["bits_per_weight"],
                "kl": record["kl"],
                "low": record["low"],
                "high": record["high"],
                "group": record["group"],
                "pareto": record["pareto"],
                "text": f"{_short(record['candidate'])}: {record['verdict']}",
            }
            for record in self.records()
            if record["bytes"] is not None
        ]

    def levels(self) -> dict[str, float]:
        """What rounding the reference's own weights costs, by name."""
        bands = self.ranked[0].measurement.bands if self.ranked else ()
        return {f"{band.bits} bits": band.kl for band in bands}


class MeasuresCandidates(StorableReference):
    """What any reference can do, whether its responses or a text are scored."""

    _groups: Sequence[str] = ()  # of each prompt or window, or none at all
    _names: Sequence[str] = ()  # what each prompt asks; unknown of a stored reference
    _clusters: Tensor | None = None  # (P,) of windows

    @cached_property
    def inputs(self) -> ForcedInputs:
        """What every model is fed."""
        return self._run.inputs(self._names)

    def score(
        self,
        candidate: Any,
        tokenizer: Any = None,
        *,
        base: Any = None,
        dtype: DtypeName | None = None,
    ) -> Measurement:
        """Measure a candidate.

        Args:
            candidate: a model as for the constructor, or `URL#MODEL`; its edits, adapters and
                quantization are in force. A training model is put in evaluation mode meanwhile.
            tokenizer: of the candidate, to be checked against the reference's. One that lies
                beside a loaded candidate is checked anyway.
            base: the model that a candidate adapter is put on, as a path or hub id; None: as the
                constructor was told.
            dtype: what a candidate given by name is loaded in; None: as the constructor was told,
                or in the reference's if that was `auto`.

        Raises:
            MeasurementError: another tokenizer, vocabulary or (for a stored reference) head; NaN
                logits; memory ran out.
            ModelError: it cannot be loaded.
        """
        floor, watch = self.noise_floor, self._accumulator()
        notes = PassNotes(self.reference, self.refusal_openers, self._reduction.temperature)
        compared = self._run.compare(
            candidate,
            tokenizer,
            reduction=self._reduction,
            base=base,
            dtype=dtype,
            floor=floor is not None,
            watch=watch,
            observe=notes,
        )
        floor = None if compared.known_tokens else floor  # which is of whole divergences
        table = replace(compared.table, clusters=self._clusters)
        weights = geometric_weights(table.positions, self.position_decay)
        summary = summarize(
            table,
            position_weights=weights,
            noise_floor=None if floor is None else floor.value,
        )
        return Measurement(
            summary,
            table,
            floor,
            self.position_decay,
            reference_dtype=self._run.dtype,
            candidate_dtype=compared.dtype,
            groups=group_means(table, self._groups, weights) if self._groups else (),
            back_end_floor=compared.back_end_floor,
            llama_rows=None if watch is None else watch.result(table, summary),
            inputs=self.inputs,
            notes=notes,
            bands=self.bands,
            known_tokens=compared.known_tokens,
        )

    def _accumulator(self) -> KLDAccumulator | None:
        """Against a file of base logits: what computes llama.cpp's own figures."""
        return None

    def compare(
        self, candidates: Sequence[Any] | Mapping[str, Any], *, dtype: DtypeName | None = None
    ) -> Comparison:
        """Measure several candidates, one after the other, and put them in order.

        Args:
            candidates: as for `score`, or by name.
            dtype: as for `score`.

        Raises:
            ValueError: there are none.
        """
        if isinstance(candidates, Mapping):
            named = list(candidates.items())
        else:
            named = [
                (str(model) if isinstance(model, str | Path) else f"candidate {number}", model)
                for number, model in enumerate(candidates, 1)
            ]
        if not named:
            raise ValueError("no candidates are given: pass at least one")
        measurements = [self.score(model, dtype=dtype) for _, model in named]
        return Comparison.of([name for name, _ in named], measurements)

    def seen_by(self, model: Any, *, base: Any = None, dtype: DtypeName | None = None) -> Self:
        """The same inputs with another model as the reference, to measure a third from it.

        Args:
            model: as for `score`.
            base: as for `score`.
            dtype: as for `score`. The third is loaded in the same where none is asked for.
        """
        other = copy(self)
        other._run = self._run.seen_by(model, base=base, dtype=dtype)
        other.bands = ()  # of another model
        return other


def _record(candidate: RankedCandidate) -> dict[str, Any]:
    measured, size, beyond = candidate.measurement, candidate.size, candidate.beyond_best
    summary, interval = measured.summary, measured.summary.interval
    return {
        "group": candidate.group,
        "candidate": candidate.name,
        "bytes": None if size is None else size.file_bytes,
        "bits_per_weight": None if size is None else size.bits_per_weight,
        "kl": summary.mean,
        "lower_bound": measured.known_tokens is not None,
        "standard_error": summary.standard_error,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "same_top_token": summary.top1_agreement,
        "gain": measured.change.gain.mean,
        "loss": measured.change.loss.mean,
        "beyond_best": None if beyond is None else beyond.mean_difference,
        "beyond_best_error": None if beyond is None else beyond.standard_error,
        "distinguishable": None if beyond is None else beyond.distinguishable,
        "pareto": candidate.pareto,
        "noise_floor": summary.noise_floor,
        "back_end_floor": measured.back_end_floor,
        "verdict": measured.verdict,
        "dtype": measured.candidate_dtype,
    }


def _line(candidate: RankedCandidate) -> tuple[str, ...]:
    size, beyond = candidate.size, candidate.beyond_best
    summary, bits = candidate.measurement.summary, None if size is None else size.bits_per_weight
    difference = ""
    if beyond is not None:
        difference = _with_error(beyond.mean_difference, beyond.standard_error, "+")
    return (
        candidate.group,
        _short(candidate.name),
        "–" if size is None else f"{size.file_bytes / 1e6:.1f}",
        "–" if bits is None else f"{bits:.2f}",
        _with_error(summary.mean, summary.standard_error),
        difference,
    )


def _short(name: str) -> str:
    return Path(name).name or name


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.3g}"
    return text if error is None else f"{text} ± {error:.2g}"


def _encoded(draw: Any) -> Any:
    return lambda drawing: str(draw(drawing)).encode()
