"""One candidate against one reference: the summary, the table behind it, the floor below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import torch
from torch import Tensor

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
from heretic_kl.score.bands import Band, place_among
from heretic_kl.score.detail import (
    ForcedInputs,
    KLSplit,
    PartMean,
    PassNotes,
    SignedChange,
    WorstPosition,
    WorstPrompt,
    part_means,
    signed_change,
    split_of,
    worst_positions,
    worst_prompts,
)
from heretic_kl.score.llama.kld_rows import LlamaRows
from heretic_kl.score.served import KnownTokens


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
    inputs: ForcedInputs | None = None
    """What both models were fed, to name prompts and positions by."""
    notes: PassNotes | None = None
    """What was noted of the candidate's logits in the same pass."""
    bands: tuple[Band, ...] = ()
    """The reference with its own weights rounded; (): not measured."""
    known_tokens: KnownTokens | None = None
    """Not None: every divergence is a lower bound, from the tokens that a server told of."""

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

    @cached_property
    def change(self) -> SignedChange:
        """Where the candidate predicts the reference's tokens better, and where worse."""
        return signed_change(self.table, self._weights)

    @cached_property
    def parts(self) -> tuple[PartMean, ...]:
        """Chains of thought and answers apart; empty where no response has a thought."""
        over_text = self.table.clusters is not None
        thinking = None if self.inputs is None or over_text else self.inputs.thinking
        if thinking is None:
            return ()
        inside = torch.zeros_like(self.table.mask)
        inside[:, : thinking.shape[1]] = thinking
        return part_means(self.table, inside, self._weights)

    @cached_property
    def split(self) -> KLSplit | None:
        """The KL of refusing or not at the opening, and the rest; None: no openers are known."""
        return split_of(self.table, self.notes, self._weights)

    @property
    def verdict(self) -> str:
        """One line: the KL, where it lies among floors and bands, and the floor."""
        if self.known_tokens is not None:
            return f"at least {self.kl:.3g} nats: {self.known_tokens}"
        floors = {"noise floor": self.summary.noise_floor}
        if self.noise_floor is not None and "bfloat16" in self._dtypes:
            floors["floor of bfloat16"] = self.noise_floor.rounding
        floors["floor across back ends"] = self.back_end_floor
        measured = {name: value for name, value in floors.items() if value is not None}
        words, place = f"{self.kl:.3g} nats", ""
        if self.bands:
            place = place_among(self.kl, self.bands, self.summary.interval)
        if not measured:
            return f"{words}: {place}" if place else words
        name, floor = max(measured.items(), key=lambda item: item[1])
        if self.kl <= floor:
            return f"{words}: not above the {name} {floor:.1g}"
        return f"{words}: {place or f'above the {name}'}; floor {floor:.1g}"

    @property
    def _dtypes(self) -> tuple[str | None, ...]:
        return self.reference_dtype, self.candidate_dtype

    def worst_prompts(self, count: int = 20) -> tuple[WorstPrompt, ...]:
        """The prompts of largest mean, the worst one first."""
        assert self.inputs is not None  # every measurement of a model has them
        return worst_prompts(self.table, self.inputs, count, self._weights)

    def worst_positions(self, count: int = 20) -> tuple[WorstPosition, ...]:
        """The positions of largest divergence, the worst one first."""
        assert self.inputs is not None and self.notes is not None
        return worst_positions(self.table, self.inputs, self.notes.best_tokens, count)

    @property
    def _weights(self) -> Tensor:
        return geometric_weights(self.table.positions, self.position_decay)

    @overload
    def compare(self, other: Measurement) -> PairedComparison: ...

    @overload
    def compare(self, other: Sequence[Measurement]) -> tuple[PairedComparison, ...]: ...

    def compare(
        self, other: Measurement | Sequence[Measurement]
    ) -> PairedComparison | tuple[PairedComparison, ...]:
        """How this candidate differs from another, paired by prompt; negative if it is closer.

        Of several others, one comparison each.

        Raises:
            MeasurementError: they were not measured on the same positions of the same responses.
        """
        if not isinstance(other, Measurement):
            return tuple(self.compare(measured) for measured in other)
        return compare_paired(self.table, other.table, position_weights=self._weights)

    def records(self) -> list[dict[str, Any]]:
        """A flat row of plain values for measured scored position, for `pandas.DataFrame`."""
        columns = {n: c for n, c in self.table.columns().items() if n != "mask"}
        places = self.table.mask.nonzero().tolist()
        return [
            {"prompt": prompt + 1, "position": position + 1}
            | {name: column[prompt, position].item() for name, column in columns.items()}
            for prompt, position in places
        ]

    def to_dict(self, *, worst: int = 0) -> dict[str, Any]:
        """Everything measured but the table, JSON-ready, with so many of the worst places.

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
            "bands": [band._asdict() for band in self.bands],
            "verdict": self.verdict,
            "change": self.change.to_dict(),
            "split": None if self.split is None else self.split.to_dict(),
            "parts": [part._asdict() for part in self.parts],
        }
        if worst:
            plain["worst_prompts"] = [place._asdict() for place in self.worst_prompts(worst)]
            plain["worst_positions"] = [place._asdict() for place in self.worst_positions(worst)]
        if self.table.clusters is not None:
            del plain["profile"]
        if self.known_tokens is not None:
            plain["known_tokens"] = self.known_tokens._asdict()
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
        least = "at least " * (self.known_tokens is not None)
        units = "prompts" if self.table.clusters is None else "clusters"
        infinite = f", {summary.infinite_count} positions infinite" * bool(summary.infinite_count)
        return (
            f"{least}{summary.mean:.4g}{error} nats{interval}{floor}{infinite} "
            f"({summary.prompts} {units}, {summary.rows} positions)"
        )
