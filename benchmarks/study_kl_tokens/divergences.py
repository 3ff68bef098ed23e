"""All divergences of a row at once, from shared sums; means over N positions. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.study_kl_tokens.task import GEOMETRIC_RATIO, POSITIONS
from heretic_kl.kl import Head, geometric_weights
from heretic_kl.kl.terms import Distribution, block_elements, distribution, row_blocks

KEPT_BYTES = 3 * 2**30
"""Of the reference's distributions, kept between edits."""


class Rows(NamedTuple):
    """What each scored position tells; all (rows,) float64, nats."""

    forward: Tensor
    reverse: Tensor
    jensen_shannon: Tensor
    log_probability: Tensor  # that the candidate gives to the reference's token
    agrees: Tensor  # 1 where the candidate's best token is the reference's token


class ReferenceDistributions:
    """The reference's distributions over its rows, in blocks; kept as far as memory allows.

    Args:
        hidden: (rows, D) final hidden states.
        head: of the reference.
    """

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self._hidden, self._head = hidden, head
        self._blocks: dict[int, Distribution] = {}
        self._bytes = 0

    def blocks(self) -> Iterator[tuple[slice, Distribution]]:
        """Rows and what the reference says there."""
        elements = block_elements(self._hidden.device)
        for block in row_blocks(len(self._hidden), self._head.vocabulary, 16 * elements):
            made = self._blocks.get(block.start)
            if made is None:
                made = distribution(self._head.logits(self._hidden[block]), torch.float32, 1.0)
                size = sum(tensor.nbytes for tensor in made)
                if self._bytes + size <= KEPT_BYTES:
                    self._blocks[block.start] = made
                    self._bytes += size
            yield block, made


def compare(
    reference: ReferenceDistributions,
    hidden: Tensor,  # (rows, D) of the candidate
    head: Head,
    tokens: Tensor,  # (rows,) of the reference's response
) -> Rows:
    """Every divergence of each row.

    Cross entropies less entropies, and the entropy of the mean less the mean entropy; logits are
    finite. In float64 on a CPU, clamped at 0.
    """
    columns = torch.empty(len(Rows._fields), len(hidden), dtype=torch.float64)
    for block, first in reference.blocks():
        logits = head.logits(hidden[block])
        for part in row_blocks(len(logits), logits.shape[1], block_elements(hidden.device)):
            place = slice(block.start + part.start, block.start + part.stop)
            second = distribution(logits[part], torch.float32, 1.0)
            columns[:, place] = torch.stack(_row_columns(first.of(part), second, tokens[place]))
    return Rows(*columns)


def token_columns(hidden: Tensor, head: Head, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's token, and whether it is the best one; (rows,) float64."""
    logs, best = [], []
    for block in row_blocks(len(hidden), head.vocabulary, 16 * block_elements(hidden.device)):
        logits = head.logits(hidden[block])
        token = tokens[block].to(logits.device)
        chosen = logits.gather(-1, token[:, None]).squeeze(-1)
        logs.append((chosen - logits.logsumexp(dim=-1)).double())
        best.append((logits.argmax(dim=-1) == token).double())
    return torch.cat(logs).cpu(), torch.cat(best).cpu()


_dot = torch.linalg.vecdot


def _row_columns(
    first: Distribution, second: Distribution, tokens: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    p, q = first.probability.double(), second.probability.double()
    logits, other_logits = first.logits.double(), second.logits.double()
    normalizer, other_normalizer = first.log_normalizer, second.log_normalizer
    entropy = normalizer - _dot(p, logits)
    other_entropy = other_normalizer - _dot(q, other_logits)
    forward = other_normalizer - _dot(p, other_logits) - entropy
    reverse = normalizer - _dot(q, logits) - other_entropy
    mean = (p + q).mul_(0.5)
    # Where the mean underflows its logarithm is multiplied by 0.
    shannon = -_dot(mean, mean.clamp_min(1e-300).log_()) - (entropy + other_entropy) / 2
    token = tokens.to(p.device)[:, None]
    log_probability = second.logits.gather(-1, token).squeeze(-1) - other_normalizer
    agrees = second.logits.argmax(dim=-1) == token.squeeze(-1)
    divergences = (forward.clamp_min(0), reverse.clamp_min(0), shannon.clamp_min(0))
    return *divergences, log_probability.double(), agrees.double()


def table(values: Tensor, lengths: Sequence[int], width: int) -> Tensor:
    """Rows (sum of lengths,) as (P, width), NaN behind each response's end."""
    filled = torch.full((len(lengths), width), torch.nan, dtype=torch.float64)
    for row, part in zip(filled, values.split(list(lengths)), strict=True):
        row[: len(part)] = part
    return filled


def prefix_means(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean over the first N positions of each prompt.

    Args:
        values: (P, T), NaN where nothing is scored.
        weights: (T,); None: all the same.

    Returns:
        (P, 8) at every N of `POSITIONS`; of a shorter response over what there is.
    """
    weight = torch.ones(values.shape[1], dtype=torch.float64) if weights is None else weights
    scored = (~values.isnan()) * weight
    sums, total = (values.nan_to_num() * weight).cumsum(1), scored.cumsum(1)
    last = [min(n, values.shape[1]) - 1 for n in POSITIONS]
    return sums[:, last] / total[:, last]


def both_weights(values: Tensor) -> Tensor:
    """Uniform and geometric means over the first N positions, (2, P, 8)."""
    geometric = geometric_weights(values.shape[1], GEOMETRIC_RATIO)
    return torch.stack([prefix_means(values), prefix_means(values, geometric)])
