"""How far two verdicts on the same responses agree: share and Cohen's kappa. Runs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heretic_kl.kl import wilson_interval
from heretic_kl.kl.intervals import Interval, sorted_quantile


@dataclass(frozen=True)
class Agreement:
    """Two yes-or-no verdicts on N responses."""

    both: int
    """Both say yes."""
    first_only: int
    second_only: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Agreement:
        """Count the verdicts of both, in the same order.

        Raises:
            ValueError: they are not as many.
        """
        pairs = list(zip(first, second, strict=True))
        cells = ((True, True), (True, False), (False, True), (False, False))
        return cls(*map(pairs.count, cells))

    @property
    def total(self) -> int:
        """N."""
        return self.both + self.first_only + self.second_only + self.neither

    @property
    def share(self) -> float | None:
        """Of responses on which they agree; None for no responses."""
        return (self.both + self.neither) / self.total if self.total else None

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance (Cohen 1960), at most 1; None where both always say the same."""
        value = float(_kappa(self._cells))
        return None if value != value else value

    def kappa_interval(self, draws: int = 2000, seed: int = 0) -> Interval | None:
        """95%, percentile bootstrap over responses; None where kappa is."""
        if self.kappa is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        shares = (self._cells / self.total).expand(draws, 4)
        drawn = torch.multinomial(shares, self.total, replacement=True, generator=generator)
        cells = torch.nn.functional.one_hot(drawn, 4).sum(dim=1).to(torch.float64)
        values = _kappa(cells)
        # A sample in which both always say the same has no kappa.
        ordered = values[~values.isnan()].sort().values
        return Interval(sorted_quantile(ordered, 0.025), sorted_quantile(ordered, 0.975))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for the details of a score."""
        share_interval = wilson_interval(self.both + self.neither, self.total)
        kappa_interval = self.kappa_interval()
        return {
            **vars(self),
            "share": self.share,
            "share_interval": list(share_interval),
            "kappa": self.kappa,
            "kappa_interval": None if kappa_interval is None else list(kappa_interval),
        }

    @property
    def _cells(self) -> Tensor:
        """(4,) float64."""
        cells = (self.both, self.first_only, self.second_only, self.neither)
        return torch.tensor(cells, dtype=torch.float64)


def agreement_text(agreement: object) -> str | None:
    """`33/39 (85%, 70% to 93%)`, of what `Agreement.to_dict` gave; None where nothing was compared.

    The share of responses on which both verdicts are the same, with its Wilson interval.
    """
    if not isinstance(agreement, Mapping) or agreement.get("share") is None:
        return None
    cells = {key: int(agreement[key]) for key in ("both", "first_only", "second_only", "neither")}
    counted = Agreement(**cells)
    low, high = agreement["share_interval"]
    same = counted.both + counted.neither
    return f"{same}/{counted.total} ({agreement['share']:.0%}, {low:.0%} to {high:.0%})"


def _kappa(
    cells: Tensor,  # (..., 4) counts: both, first only, second only, neither
) -> Tensor:  # (...,) NaN where chance alone agrees always
    both, first, second, neither = cells.unbind(dim=-1)
    total = both + first + second + neither
    observed = (both + neither) / total
    yes, other_yes = (both + first) / total, (both + second) / total
    chance = yes * other_yes + (1 - yes) * (1 - other_yes)
    return torch.where(chance < 1, (observed - chance) / (1 - chance), torch.nan)
