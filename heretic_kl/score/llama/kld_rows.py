"""The rows that `llama-perplexity --kl-divergence` prints, by its own formulas, beside ours."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.kl import KLSummary, KLTable, LogitBlock
from heretic_kl.kl.intervals import sorted_quantile
from heretic_kl.score.llama.base_logits import BaseLogits

SKIPPED_BELOW = -16.0
"""Log-probabilities that llama.cpp leaves out of its sum."""
LEVELS = {
    "maximum": 1.0,
    "99.9%": 0.999,
    "99%": 0.99,
    "95%": 0.95,
    "90%": 0.9,
    "median": 0.5,
    "10%": 0.1,
    "5%": 0.05,
    "1%": 0.01,
    "minimum": 0.0,
}


class KLDRow(NamedTuple):
    """One row, by llama.cpp's formula and by ours; shares are shares, KLs nats."""

    name: str
    llama: float
    llama_error: float | None
    """One standard error as llama.cpp has it: tokens independent."""
    ours: float
    ours_error: float | None
    """Clustered by window."""


@dataclass(frozen=True)
class LlamaRows:
    """What llama.cpp's program would print of a candidate, and what its file leaves out."""

    rows: tuple[KLDRow, ...]
    clipped_mass: float
    """The candidate's probability of tokens that the file clips, mean over positions."""


@dataclass
class KLDAccumulator:
    """Takes a candidate's logits block by block, on their way to our own statistics."""

    base: BaseLogits
    tokens: Tensor  # (rows,) int64, of the text
    _kld: Tensor = field(init=False)
    _change: Tensor = field(init=False)
    _same_top: Tensor = field(init=False)
    _clipped: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Make room for a number a row."""
        rows = self.base.rows
        self._kld, self._change, self._clipped = (
            torch.zeros(rows, dtype=torch.float64) for _ in range(3)
        )
        self._same_top = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, block: LogitBlock) -> LogitBlock:
        """Note a block; return it without the tokens that the file does not tell apart."""
        rows, logits = block.rows, block.logits.to("cpu", torch.float32)
        stored, clipped = self.base.stored(rows), self.base.clipped(rows)
        log_probability = logits.double().log_softmax(-1)
        ratio = (stored.double() - log_probability).mul_(stored.double().exp())
        self._kld[rows] = ratio.masked_fill_(stored <= SKIPPED_BELOW, 0.0).sum(-1)
        token = self.tokens[rows].unsqueeze(-1)
        ours, theirs = log_probability.gather(-1, token).exp(), stored.gather(-1, token).exp()
        self._change[rows] = (ours - theirs).squeeze(-1).double()
        self._same_top[rows] = logits.argmax(-1) == stored.argmax(-1)
        self._clipped[rows] = log_probability.exp_().masked_fill_(~clipped, 0.0).sum(-1)
        return LogitBlock(rows, logits.masked_fill(clipped, -math.inf))

    def result(self, table: KLTable, summary: KLSummary) -> LlamaRows:
        """All rows, once every block was noted; `table` and `summary` are our measurement."""
        theirs = self._kld.sort().values
        ours = table.values[table.mask & ~table.infinite].sort().values
        change = (table.candidate_probability - table.reference_probability)[table.mask]
        rows = [KLDRow("mean", *_mean(self._kld), summary.mean, summary.standard_error)]
        for name, level in LEVELS.items():
            values = sorted_quantile(theirs, level), None, sorted_quantile(ours, level), None
            rows.append(KLDRow(name, *values))
        square, error = _mean(self._change**2)
        rms = math.sqrt(square)
        spread = None if error is None or rms == 0.0 else error / (2.0 * rms)
        rows.append(
            KLDRow("RMS change of p", rms, spread, float(change.square().mean().sqrt()), None)
        )
        same, same_error = _mean(self._same_top.double())
        rows.append(KLDRow("same top token", same, same_error, summary.top1_agreement, None))
        return LlamaRows(tuple(rows), float(self._clipped.mean()))


def _mean(values: Tensor) -> tuple[float, float | None]:
    """The mean and its standard error if all values were independent."""
    count = values.numel()
    if count < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std() / math.sqrt(count))
