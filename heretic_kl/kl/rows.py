"""What one scored position tells: a row of numbers. Knows nothing about prompts.

A row is one position of one prompt: the reference's distribution over the next token, the
candidate's, and the token that the reference's own answer has there.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.kl.divergence import require_same_shape
from heretic_kl.kl.metric import Direction
from heretic_kl.kl.terms import (
    block_divergence,
    block_elements,
    require_direction,
    require_finite,
    require_temperature,
    row_blocks,
    working_device,
    working_pair,
)


class RowStatistics(NamedTuple):
    """Statistics of each row, on the logits' device; probabilities at the same temperature."""

    divergence: Tensor  # (rows,) float64, nats, +inf where `infinite`
    infinite: Tensor  # (rows,) bool: the second distribution lacks a token of the first
    reference_probability: Tensor  # (rows,) float64, of the reference token
    candidate_probability: Tensor  # (rows,) float64, of the reference token
    reference_top1_probability: Tensor  # (rows,) float64
    reference_margin: Tensor  # (rows,) float64, the best token's lead over the second best
    top1_agreement: Tensor  # (rows,) bool: both have the same best token


@torch.no_grad()
def row_statistics(
    reference_logits: Tensor,  # (rows, V) raw, any floating dtype
    candidate_logits: Tensor,  # (rows, V) raw, same device
    reference_tokens: Tensor,  # (rows,) integer token ids in [0, V)
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> RowStatistics:
    """Return the statistics of each row; divergences in nats, nothing averaged.

    Works through the rows in blocks: beyond its inputs it holds about ten blocks of
    `terms.BLOCK_ELEMENTS`, whatever V is.

    Raises:
        ValueError: Shapes, devices, token ids or options do not fit; both shapes are named.
        MeasurementError: A row holds NaN or +inf, or only -inf.
    """
    require_direction(direction)
    require_temperature(temperature)
    require_same_shape(reference_logits, candidate_logits)
    if reference_logits.dim() != 2:
        raise ValueError(f"logits must be (rows, V), got {tuple(reference_logits.shape)}")
    tokens = _checked_tokens(reference_tokens, reference_logits)
    rows, width = reference_logits.shape
    found = empty_rows(rows, working_device(reference_logits))
    for block in row_blocks(rows, width, block_elements(reference_logits.device)):
        first, second = working_pair(reference_logits[block], candidate_logits[block], temperature)
        part = _block_statistics(first, second, tokens[block], direction)
        # Kept results of a few bytes among freed blocks of megabytes would fragment the heap.
        for column, values in zip(found, part, strict=True):
            column[block] = values
    return found


def concatenate_rows(parts: list[RowStatistics]) -> RowStatistics:
    """Return the rows of all `parts`, in order; no parts give no rows."""
    if not parts:
        return empty_rows(0, torch.device("cpu"))
    return RowStatistics(*(torch.cat(column) for column in zip(*parts, strict=True)))


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


def _block_statistics(
    reference: Tensor, candidate: Tensor, tokens: Tensor, direction: Direction
) -> RowStatistics:
    """Return the statistics of one block in its working dtype."""
    result = block_divergence(reference, candidate, direction)
    reference_log_z = result.reference_log_normalizer
    candidate_log_z = result.candidate_log_normalizer
    require_finite(reference_log_z, "reference")
    require_finite(candidate_log_z, "candidate")
    token = tokens.to(reference.device).unsqueeze(-1)
    best, second, best_token = _top_two(reference)
    best_probability = (best.to(torch.float64) - reference_log_z).exp()
    second_probability = (second.to(torch.float64) - reference_log_z).exp()
    of_reference = reference.gather(-1, token).squeeze(-1).to(torch.float64)
    of_candidate = candidate.gather(-1, token).squeeze(-1).to(torch.float64)
    return RowStatistics(
        divergence=result.divergence,
        infinite=result.infinite,
        reference_probability=(of_reference - reference_log_z).exp(),
        candidate_probability=(of_candidate - candidate_log_z).exp(),
        reference_top1_probability=best_probability,
        reference_margin=best_probability - second_probability,
        top1_agreement=best_token == candidate.argmax(dim=-1),
    )


def _top_two(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's best and second best logit (-inf if V is 1) and the best token."""
    best_token = logits.argmax(dim=-1)
    best = logits.gather(-1, best_token.unsqueeze(-1)).squeeze(-1)
    rest = logits.scatter(-1, best_token.unsqueeze(-1), float("-inf"))
    return best, rest.amax(dim=-1), best_token
