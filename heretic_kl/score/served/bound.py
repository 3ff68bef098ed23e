"""A lower bound of the forward KL where only a candidate's likeliest tokens are known.

Of a position a server tells the log-probabilities of some tokens S. All other tokens are one cell,
with what is left of either distribution. By the log-sum inequality merging cells never raises a
divergence, so that with P the reference and Q the candidate

    sum over S of P(i) log(P(i) / Q(i))  +  P(rest) log(P(rest) / Q(rest))  <=  KL(P || Q)

where P(rest) = 1 - sum over S of P(i), and likewise Q(rest). More tokens in S never lower it, and
with all tokens it is the KL. Q(rest) is a difference of rounded numbers: `REST_ROUNDING` is added,
which can only lower the bound.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.kl.head import Head
from heretic_kl.kl.reference import Reference
from heretic_kl.kl.rows import RowStatistics, empty_rows, reference_rows
from heretic_kl.kl.table import KLTable

REST_ROUNDING: Final = 1e-6
"""Of a sum of probabilities that were computed and sent in float32."""
MOST_MASS: Final = 1.001
"""A sum of probabilities beyond which they are no part of one distribution."""


class TopBlock(NamedTuple):
    """What is known of a candidate at some scored positions."""

    rows: Tensor  # (n,) int64, among the reference's rows
    tokens: Tensor  # (n, k) int64, each once in a row, the response's token among them; -1: none
    log_probabilities: Tensor  # (n, k) float64, at temperature 1


class LowerBound(NamedTuple):
    """A table of lower bounds, and the probability of all tokens that are not told apart."""

    table: KLTable
    reference_rest: Tensor  # (P, N) float64, 0 where nothing is scored
    candidate_rest: Tensor  # (P, N) float64
    best_tokens: Tensor  # (rows,) int64, the candidate's


@torch.no_grad()
def lower_bound(
    reference: Reference, blocks: Iterable[TopBlock], head: Head | None = None
) -> LowerBound:
    """Return the (P, N) table of lower bounds of KL(reference || candidate), in nats.

    Args:
        reference: All of its distribution is known.
        blocks: All rows, each once, in any order.
        head: Of stored hidden states.

    Raises:
        ValueError: Rows are missing.
        MeasurementError: Probabilities of a row add to more than one, or are NaN.
    """
    statistics = empty_rows(reference.rows, torch.device("cpu"))
    rests = torch.zeros(2, reference.rows, dtype=torch.float64)
    best = torch.zeros(reference.rows, dtype=torch.int64)
    tokens, missing = reference.row_tokens, torch.ones(reference.rows, dtype=torch.bool)
    for block in blocks:
        rows = block.rows
        part, rests[:, rows], best[rows] = _block(
            reference.logits_of(rows, head).cpu(), block, tokens[rows]
        )
        for column, values in zip(statistics, part, strict=True):
            column[rows] = values
        missing[rows] = False
    if bool(missing.any()):
        raise ValueError(f"{int(missing.sum())} of {reference.rows} rows are missing")
    table = KLTable.from_rows(
        statistics, reference.prompt_index, reference.position, *reference.mask.shape
    )
    laid_out = torch.zeros(2, *reference.mask.shape, dtype=torch.float64)
    laid_out[:, reference.mask] = rests
    return LowerBound(replace(table, lower_bound=True), laid_out[0], laid_out[1], best)


def _block(
    logits: Tensor,  # (n, V) the reference's
    block: TopBlock,
    tokens: Tensor,  # (n,) int64, the responses'
) -> tuple[RowStatistics, Tensor, Tensor]:
    """Statistics of a block, both rests (2, n), and the candidate's best tokens (n,)."""
    whole = reference_rows(logits)
    present, index = block.tokens >= 0, block.tokens.clamp_min(0)
    log_p = whole.distribution.logits.double() - whole.distribution.log_normalizer.unsqueeze(-1)
    log_p = log_p.gather(-1, index).masked_fill_(~present, -torch.inf)
    log_q = block.log_probabilities.masked_fill(~present, -torch.inf)
    p, q = log_p.exp(), log_q.exp()
    mass = q.sum(-1)
    if not bool((mass <= MOST_MASS).all()):
        raise MeasurementError(
            f"probabilities of one position add to {float(mass.max()):.4g}: they are no "
            "log-probabilities of the model's own distribution"
        )
    rest = torch.stack([1.0 - p.sum(-1), 1.0 - mass]).clamp_min_(0.0)
    cells = torch.where(p > 0.0, p * (log_p - log_q), 0.0).sum(-1)
    values = cells + torch.xlogy(rest[0], rest[0]) - rest[0] * (rest[1] + REST_ROUNDING).log()
    ours = index == tokens.unsqueeze(-1)
    best = index.gather(-1, log_q.argmax(-1, keepdim=True)).squeeze(-1)
    statistics = RowStatistics(
        values=values.clamp_min(0.0),
        infinite=values == torch.inf,
        reference_probability=(p * ours).sum(-1),
        candidate_probability=(q * ours).sum(-1),
        reference_top1_probability=whole.top1_probability,
        reference_margin=whole.margin,
        top1_agreement=whole.best_token == best,
    )
    return statistics, rest, best
