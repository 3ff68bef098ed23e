"""Where a candidate predicts the reference's tokens better, and where worse. Runs no model.

With `d = log Q(token) - log P(token)` of the token that the text or response has, in nats, the gain
is the mean of `max(d, 0)` and the loss that of `max(-d, 0)`: over positions, then over prompts.
Tokens of a greedy response are the reference's own choice, so that an unbiased candidate loses more
than it gains there; over text or drawn responses it does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from heretic_kl.kl import KLTable, MeanEstimate, mean_estimate, prompt_means, standard_error

CONFIDENCE: Final = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
"""Bounds of buckets of the reference's probability of its best token."""


class ConfidenceBucket(NamedTuple):
    """Positions at which the reference is about equally sure."""

    low: float
    """Least probability of its best token; `high` is the first that is in the next bucket."""
    high: float
    positions: int
    change: float
    """Candidate's minus reference's probability of the reference token, mean."""
    standard_error: float | None
    """Of the change, clustered by prompt."""
    kl: float
    """Nats, mean."""


@dataclass(frozen=True)
class SignedChange:
    """How the reference's tokens are predicted; nats, with errors clustered by prompt."""

    gain: MeanEstimate
    loss: MeanEstimate
    net: MeanEstimate
    """Gain minus loss; over text, the fall of the cross-entropy."""
    better: float
    """Share of positions whose token has become more probable."""
    worse: float
    buckets: tuple[ConfidenceBucket, ...]
    """Those that have a position, the least sure one first."""
    excluded: int
    """Positions that are infinite, or whose token has probability 0 in the candidate."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **{name: plain_estimate(getattr(self, name)) for name in ("gain", "loss", "net")},
            "better": self.better,
            "worse": self.worse,
            "buckets": [bucket._asdict() for bucket in self.buckets],
            "excluded": self.excluded,
        }


class PartMean(NamedTuple):
    """The chain of thought of all responses, or what follows it; nats."""

    name: str
    kl: float
    standard_error: float | None
    positions: int
    prompts: int
    """Those that have such a part."""
    gain: float
    loss: float


def signed_change(table: KLTable, position_weights: Tensor | None = None) -> SignedChange:
    """Measure it from a table.

    Args:
        table: of any divergence.
        position_weights: (N,), as in `summarize`.
    """
    difference, usable = _log_change(table)

    def means(values: Tensor, keep: Tensor = usable) -> Tensor:
        return prompt_means(table, values=values, keep=keep, position_weights=position_weights)

    shift = table.candidate_probability - table.reference_probability
    sure = table.reference_top1_probability
    buckets = []
    for low, high in zip(CONFIDENCE, CONFIDENCE[1:], strict=False):
        inside = usable & (sure >= low) & ((sure < high) | torch.tensor(high == CONFIDENCE[-1]))
        if bool(inside.any()):
            changes = means(shift, inside)
            kl = float(means(table.values, inside).mean())
            error = standard_error(changes)
            buckets.append(
                ConfidenceBucket(low, high, int(inside.sum()), float(changes.mean()), error, kl)
            )
    return SignedChange(
        gain=mean_estimate(means(difference.clamp_min(0.0))),
        loss=mean_estimate(means((-difference).clamp_min(0.0))),
        net=mean_estimate(means(difference)),
        better=float(means((difference > 0.0).double()).mean()),
        worse=float(means((difference < 0.0).double()).mean()),
        buckets=tuple(buckets),
        excluded=int(table.mask.sum() - usable.sum()),
    )


def part_means(
    table: KLTable,
    thinking: Tensor,  # (P, N) bool
    position_weights: Tensor | None = None,  # (N,)
) -> tuple[PartMean, ...]:
    """The thoughts and the answers of all responses apart; empty where nothing is thought."""
    difference, usable = _log_change(table)
    if not bool((usable & thinking).any()):
        return ()
    parts = []
    for name, inside in (("thinking", usable & thinking), ("answer", usable & ~thinking)):
        if bool(inside.any()):
            kl, gain, loss = (
                prompt_means(table, values=values, keep=inside, position_weights=position_weights)
                for values in (table.values, difference.clamp_min(0), (-difference).clamp_min(0))
            )
            mean, error = float(kl.mean()), standard_error(kl)
            signed = float(gain.mean()), float(loss.mean())
            parts.append(PartMean(name, mean, error, int(inside.sum()), len(kl), *signed))
    return tuple(parts)


def plain_estimate(estimate: MeanEstimate) -> dict[str, Any]:
    """A mean with its error, JSON-ready."""
    interval = None if estimate.interval is None else estimate.interval._asdict()
    return {**estimate._asdict(), "interval": interval}


def _log_change(table: KLTable) -> tuple[Tensor, Tensor]:
    """(P, N) `log Q - log P` of the reference tokens, and where it is finite and scored."""
    p, q = table.reference_probability, table.candidate_probability
    usable = table.mask & ~table.infinite & (p > 0.0) & (q > 0.0)
    return torch.where(usable, q.log() - p.log(), 0.0), usable
