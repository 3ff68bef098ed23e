"""What one scored position tells: a row of numbers. Knows nothing about prompts.

A row is one position of one prompt: the reference's distribution over the next token, the
candidate's, and the token that the reference's own response has there.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.kl.divergence import require_same_shape
from heretic_kl.kl.terms import (
    Distribution,
    Divergence,
    best_tokens,
    block_divergence,
    block_elements,
    distribution,
    require_divergence,
    require_finite,
    require_temperature,
    row_blocks,
    working_device,
    working_dtype,
)


class RowStatistics(NamedTuple):
    """Statistics of each row, on the logits' device; probabilities at the same temperature."""

    values: Tensor  # (rows,) float64, nats, +inf where `infinite`
    infinite: Tensor  # (rows,) bool: the second distribution lacks a token of the first
    reference_probability: Tensor  # (rows,) float64, of the reference token
    candidate_probability: Tensor  # (rows,) float64, of the reference token
    reference_top1_probability: Tensor  # (rows,) float64
    reference_margin: Tensor  # (rows,) float64, the best token's lead over the second best
    top1_agreement: Tensor  # (rows,) bool: both have the same best token


class ReferenceRows(NamedTuple):
    """What `row_statistics` needs of the reference, worth keeping where candidates are many."""

    distribution: Distribution
    best_token: Tensor  # (rows,) int64
    top1_probability: Tensor  # (rows,) float64
    margin: Tensor  # (rows,) float64
    temperature: float

    @property
    def bytes(self) -> int:
        """Memory that it takes, the logits included; about 12 bytes a logit on a CPU."""
        tensors = [*self.distribution, self.best_token, self.top1_probability, self.margin]
        return sum(tensor.nbytes for tensor in tensors)

    def of(self, rows: slice) -> "ReferenceRows":
        """Return some of the rows."""
        return ReferenceRows(
            self.distribution.of(rows),
            self.best_token[rows],
            self.top1_probability[rows],
            self.margin[rows],
            self.temperature,
        )


@torch.no_grad()
def reference_rows(logits: Tensor, *, temperature: float = 1.0) -> ReferenceRows:
    """Return what `row_statistics` needs of the reference's raw logits (rows, V).

    Raises:
        ValueError: `logits` is not (rows, V), or the temperature not positive.
        MeasurementError: A row holds NaN or +inf, or only -inf.
    """
    require_temperature(temperature)
    _require_rows(logits)
    dtype = working_dtype(logits.dtype, logits.dtype)
    rows, width = logits.shape
    # No rows are one block of none.
    blocks = list(row_blocks(rows, width, block_elements(logits.device))) or [slice(0)]
    parts = [_reference_block(logits[block], dtype, temperature) for block in blocks]
    columns = zip(*(part.distribution for part in parts), strict=True)
    return ReferenceRows(
        Distribution(*(torch.cat(tensors) for tensors in columns)),
        torch.cat([part.best_token for part in parts]),
        torch.cat([part.top1_probability for part in parts]),
        torch.cat([part.margin for part in parts]),
        temperature,
    )


@torch.no_grad()
def row_statistics(
    reference: Tensor | ReferenceRows,  # (rows, V) raw logits, any floating dtype
    candidate_logits: Tensor,  # (rows, V) raw, same device
    reference_tokens: Tensor,  # (rows,) integer token ids in [0, V)
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
) -> RowStatistics:
    """Return the statistics of each row; divergences in nats, nothing averaged.

    Works through the rows in blocks: beyond its inputs it holds about ten blocks of
    `terms.BLOCK_ELEMENTS`, whatever V is.

    Args:
        reference: Its logits, or what `reference_rows` made of them at the same temperature.
        candidate_logits: Compared with them row by row.
        reference_tokens: What the reference's own response has there.
        divergence: Which divergence.
        temperature: Both logits are divided by it.

    Raises:
        ValueError: Shapes, devices, token ids or options do not fit; both shapes are named.
        MeasurementError: A row holds NaN or +inf, or only -inf.
    """
    require_divergence(divergence)
    require_temperature(temperature)
    if isinstance(reference, ReferenceRows):
        prepared, logits = reference, reference.distribution.logits
        dtype = logits.dtype
        if prepared.temperature != temperature:
            raise ValueError(
                f"the reference was prepared at temperature {prepared.temperature}, "
                f"not {temperature}"
            )
        require_same_shape(logits.to("meta"), candidate_logits.to("meta"))
    else:
        prepared, logits = None, reference
        dtype = working_dtype(logits.dtype, candidate_logits.dtype)
        require_same_shape(logits, candidate_logits)
    _require_rows(candidate_logits)
    tokens = _checked_tokens(reference_tokens, candidate_logits)
    rows, width = candidate_logits.shape
    statistics = empty_rows(rows, working_device(candidate_logits))
    for block in row_blocks(rows, width, block_elements(candidate_logits.device)):
        if prepared is not None:
            first = prepared.of(block)
        else:
            first = _reference_block(logits[block], dtype, temperature)
        second = distribution(candidate_logits[block], dtype, temperature)
        part = _block_statistics(first, second, tokens[block], divergence)
        # Kept results of a few bytes among freed blocks of megabytes would fragment the heap.
        for column, values in zip(statistics, part, strict=True):
            column[block] = values
    return statistics


@dataclass(frozen=True)
class DivergenceReduction:
    """`row_statistics` with its options, as a request for them; equal options are equal."""

    divergence: Divergence = "forward_kl"
    temperature: float = 1.0

    def prepare(self, reference: Tensor) -> ReferenceRows:
        """The part that raw reference logits (rows, V) have in it."""
        return reference_rows(reference, temperature=self.temperature)

    def __call__(
        self, reference: Tensor | ReferenceRows, candidate: Tensor, tokens: Tensor
    ) -> RowStatistics:
        """Statistics of rows of raw logits (rows, V) and token ids (rows,)."""
        return row_statistics(
            reference, candidate, tokens, divergence=self.divergence, temperature=self.temperature
        )


def empty_rows(rows: int, device: torch.device) -> RowStatistics:
    """Return columns of `rows` places to be filled."""
    flags = ("infinite", "top1_agreement")
    return RowStatistics(
        **{
            name: torch.empty(
                rows, dtype=torch.bool if name in flags else torch.float64, device=device
            )
            for name in RowStatistics._fields
        }
    )


def _checked_tokens(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the token ids as int64 on the logits' device, or raise `ValueError`."""
    rows, width = logits.shape
    if tokens.shape != (rows,):
        raise ValueError(
            f"reference_tokens must have shape ({rows},) to fit logits {tuple(logits.shape)}, "
            f"got {tuple(tokens.shape)}"
        )
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise ValueError(f"reference_tokens must be integers, got {tokens.dtype}")
    tokens = tokens.to(device=logits.device, dtype=torch.int64)
    if rows and not bool(((tokens >= 0) & (tokens < width)).all()):
        raise ValueError(
            f"reference_tokens must be in [0, {width}), got "
            f"{int(tokens.min())} to {int(tokens.max())}"
        )
    return tokens


def _require_rows(logits: Tensor) -> None:
    if logits.dim() != 2:
        raise ValueError(f"logits must be (rows, V), got {tuple(logits.shape)}")


def _reference_block(logits: Tensor, dtype: torch.dtype, temperature: float) -> ReferenceRows:
    """Return what `row_statistics` needs of one block of the reference."""
    scaled = distribution(logits, dtype, temperature)
    require_finite(scaled.log_normalizer, "reference")
    best, second, best_token = _top_two(scaled.logits)
    top1_probability = (best.to(torch.float64) - scaled.log_normalizer).exp()
    second_probability = (second.to(torch.float64) - scaled.log_normalizer).exp()
    margin = top1_probability - second_probability
    return ReferenceRows(scaled, best_token, top1_probability, margin, temperature)


def _block_statistics(
    reference: ReferenceRows, candidate: Distribution, tokens: Tensor, divergence: Divergence
) -> RowStatistics:
    """Return the statistics of one block."""
    require_finite(candidate.log_normalizer, "candidate")
    result = block_divergence(reference.distribution, candidate, divergence)
    token = tokens.to(candidate.logits.device).unsqueeze(-1)
    return RowStatistics(
        values=result.values,
        infinite=result.infinite,
        reference_probability=_probability_of(token, reference.distribution),
        candidate_probability=_probability_of(token, candidate),
        reference_top1_probability=reference.top1_probability,
        reference_margin=reference.margin,
        top1_agreement=reference.best_token == best_tokens(candidate.logits),
    )


def _probability_of(token: Tensor, rows: Distribution) -> Tensor:
    """Return each row's probability of its token, (rows,) float64."""
    logit = rows.logits.gather(-1, token).squeeze(-1).to(torch.float64)
    return (logit - rows.log_normalizer).exp()


def _top_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's best and second best logit (-inf if V is 1) and the best token."""
    best_token = best_tokens(logits)
    best = logits.gather(-1, best_token.unsqueeze(-1)).squeeze(-1)
    rest = logits.scatter(-1, best_token.unsqueeze(-1), float("-inf"))
    return best, rest.amax(dim=-1), best_token
