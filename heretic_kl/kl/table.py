"""What was measured, position by position: a prompt-by-position table. Averages nothing.

`P` prompts, `N` positions of the reference's response. Position 0 predicts the response's first
token; `mask` is True up to and including the position that predicts the end token.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

import torch
from torch import Tensor

from heretic_kl.kl.rows import RowStatistics
from heretic_kl.kl.storage import load_tensors, save_tensors, undamaged
from heretic_kl.kl.terms import Divergence, require_divergence, require_temperature

_KIND: Final = "heretic-kl table"


@dataclass(frozen=True, eq=False)
class KLTable:
    """Per-position statistics, all (P, N) on the CPU; 0 or False where `mask` is False.

    What stands at unscored places never matters to a summary.
    """

    values: Tensor  # (P, N) float64, nats, +inf where `infinite`
    mask: Tensor  # (P, N) bool, True where a position was scored
    infinite: Tensor  # (P, N) bool
    reference_probability: Tensor  # (P, N) float64, of the reference token
    candidate_probability: Tensor  # (P, N) float64, of the reference token
    reference_top1_probability: Tensor  # (P, N) float64
    reference_margin: Tensor  # (P, N) float64
    top1_agreement: Tensor  # (P, N) bool
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    clusters: Tensor | None = None  # (P,) integer: which rows depend on each other; None: none
    lower_bound: bool = False  # values are at most the divergence, see `score/served/bound.py`

    def __post_init__(self) -> None:
        """Raise `ValueError` unless all columns are (P, N) of one shape."""
        require_divergence(self.divergence)
        require_temperature(self.temperature)
        if self.values.dim() != 2:
            raise ValueError(f"values must be (P, N), got {tuple(self.values.shape)}")
        for name, column in self.columns().items():
            if column.shape != self.values.shape:
                raise ValueError(
                    f"{name} must have the values' shape {tuple(self.values.shape)}, "
                    f"got {tuple(column.shape)}"
                )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {self.mask.dtype}")
        if self.clusters is not None and self.clusters.shape != self.values.shape[:1]:
            raise ValueError(
                f"clusters must be ({self.prompts},), got {tuple(self.clusters.shape)}"
            )

    @property
    def prompts(self) -> int:
        """P, the number of prompts."""
        return int(self.values.shape[0])

    @property
    def positions(self) -> int:
        """N, the number of positions."""
        return int(self.values.shape[1])

    @classmethod
    def from_rows(
        cls,
        rows: RowStatistics,
        prompt_index: Tensor,  # (rows,) integer in [0, P)
        position: Tensor,  # (rows,) integer in [0, N)
        prompts: int,
        positions: int,
        *,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
    ) -> "KLTable":
        """Lay out rows as a table; places that no row fills are not scored.

        Raises:
            ValueError: Indices are out of range, do not fit the rows, or two rows have one
                place.
        """
        count = rows.values.shape[0]
        prompt = prompt_index.to(device="cpu", dtype=torch.int64)
        place = position.to(device="cpu", dtype=torch.int64)
        for name, index, bound in (
            ("prompt_index", prompt, prompts),
            ("position", place, positions),
        ):
            if index.shape != (count,):
                raise ValueError(f"{name} must be ({count},), got {tuple(index.shape)}")
            if count and not (0 <= int(index.min()) and int(index.max()) < bound):
                raise ValueError(
                    f"{name} must be in [0, {bound}), got {int(index.min())} to {int(index.max())}"
                )
        flat = prompt * positions + place
        mask = torch.zeros(prompts * positions, dtype=torch.bool)
        mask[flat] = True
        if int(mask.sum()) != count:
            raise ValueError("two rows have the same prompt and position")
        columns: dict[str, Tensor] = {}
        for name, column in rows._asdict().items():
            filled = torch.zeros(prompts * positions, dtype=column.dtype)
            filled[flat] = column.detach().cpu()
            columns[name] = filled.reshape(prompts, positions)
        return cls(
            mask=mask.reshape(prompts, positions),
            divergence=divergence,
            temperature=temperature,
            lower_bound=False,
            **columns,
        )

    def columns(self) -> dict[str, Tensor]:
        """Return the (P, N) tensors by name."""
        return {name: getattr(self, name) for name in (*RowStatistics._fields, "mask")}

    def select_prompts(
        self,
        prompts: Tensor,  # (any,) integer row numbers, or (P,) bool
    ) -> "KLTable":
        """Return the table of these prompts only, in the given order."""
        return KLTable(
            divergence=self.divergence,
            temperature=self.temperature,
            lower_bound=self.lower_bound,
            clusters=None if self.clusters is None else self.clusters[prompts],
            **{name: column[prompts] for name, column in self.columns().items()},
        )

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors, in one step."""
        names = ("divergence", "temperature", "lower_bound")
        facts = {name: getattr(self, name) for name in names}
        clusters = {} if self.clusters is None else {"clusters": self.clusters}
        save_tensors(path, _KIND, {**self.columns(), **clusters}, facts)

    @classmethod
    def load(cls, path: str | Path) -> "KLTable":
        """Read a saved table.

        Raises:
            MeasurementError: The file is missing, damaged, no table, or of another metric version.
        """
        tensors, facts = load_tensors(path, _KIND)
        with undamaged(path):
            divergence = cast(Divergence, facts["divergence"])
            temperature = float(cast(float, facts["temperature"]))
            bound = facts.get("lower_bound") is True
            return cls(divergence=divergence, temperature=temperature, lower_bound=bound, **tensors)
