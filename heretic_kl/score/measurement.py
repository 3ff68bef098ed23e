"""One candidate against one reference: the summary, the table behind it, the floor below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from heretic_kl.engine import NoiseFloor
from heretic_kl.kl import (
    GroupMean,
    KLSummary,
    KLTable,
    PairedComparison,
    compare_paired,
    geometric_weights,
    macro_average,
)
from heretic_kl.score.llama.kld_rows import LlamaRows


@dataclass(frozen=True)
class Measurement:
    """What `TeacherForcedKL.score` and `TextKL.score` return; prints as one line."""

    summary: KLSummary
    table: KLTable
    """(P, N), position by position; `table.save(path)` keeps it."""
    noise_floor: NoiseFloor | None
    """Of the reference; None if it was not measured."""
    position_decay: float = 1.0
    reference_dtype: str | None = None
    """What the reference computed in, for instance `bfloat16`."""
    candidate_dtype: str | None = None
    """Where it is another, part of the KL is rounding."""
    groups: tuple[GroupMean, ...] = ()
    """Over text by file or category, of prompts that have one by category; in order."""
    back_end_floor: float | None = None
    """Nats between the two back ends on the candidate itself; None: not measured, or only one."""
    llama_rows: LlamaRows | None = None
    """Against a file of base logits: what llama.cpp's own program would print."""

    @property
    def kl(self) -> float:
        """Nats; mean over finite positions, then over prompts, or over documents of a text.

        Over the windows of each group of text that is a single document.
        """
        return self.summary.mean

    @property
    def macro_average(self) -> GroupMean | None:
        """The mean of the groups' means, each counting alike; None without groups."""
        return macro_average(self.groups) if self.groups else None

    def compare(self, other: Measurement) -> PairedComparison:
        """How this candidate differs from another, paired by prompt; negative if it is closer.

        Raises:
            MeasurementError: they were not measured on the same positions of the same responses.
        """
        weights = geometric_weights(self.table.positions, self.position_decay)
        return compare_paired(self.table, other.table, position_weights=weights)

    def to_dict(self) -> dict[str, Any]:
        """The summary, both floors and both dtypes, JSON-ready.

        Over text by group, without the profile over positions, which are a window's there.
        """
        floor = self.noise_floor
        plain = {
            **self.summary.to_dict(),
            "position_decay": self.position_decay,
            "rounding_floor": None if floor is None else floor.rounding,
            "reference_dtype": self.reference_dtype,
            "candidate_dtype": self.candidate_dtype,
            "back_end_floor": self.back_end_floor,
        }
        if self.table.clusters is not None:
            del plain["profile"]
        if self.groups:
            plain["groups"] = [group._asdict() for group in self.groups]
            plain["macro_average"] = macro_average(self.groups)._asdict()
        if self.llama_rows is not None:
            plain["llama_rows"] = [row._asdict() for row in self.llama_rows.rows]
            plain["clipped_mass"] = self.llama_rows.clipped_mass
        return plain

    def __str__(self) -> str:
        summary = self.summary
        error = "" if summary.standard_error is None else f" ± {summary.standard_error:.4g}"
        interval = ""
        if summary.interval is not None:
            interval = f", 95% {summary.interval.low:.4g} to {summary.interval.high:.4g}"
        floor = ""
        if summary.noise_floor is not None:
            below = "below the " if summary.below_noise_floor else ""
            floor = f", {below}noise floor {summary.noise_floor:.1g}"
        units = "prompts" if self.table.clusters is None else "clusters"
        infinite = f", {summary.infinite_count} positions infinite" * bool(summary.infinite_count)
        return (
            f"{summary.mean:.4g}{error} nats{interval}{floor}{infinite} "
            f"({summary.prompts} {units}, {summary.rows} positions)"
        )
