"""The prompts and positions that moved furthest, by name. Runs no model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.kl import KLTable
from heretic_kl.score.detail.inputs import ForcedInputs


class WorstPrompt(NamedTuple):
    """A prompt, or a window of text."""

    prompt: int
    """Its place, from 1."""
    text: str
    kl: float
    """Nats, mean over its finite positions."""
    positions: int


class WorstPosition(NamedTuple):
    """One scored position."""

    prompt: int
    """Its place, from 1; so is the position's in the response or the scored part of a window."""
    position: int
    kl: float
    """Nats; infinite where the candidate excludes a token that the reference allows."""
    reference_probability: float
    """Of the token."""
    candidate_probability: float
    token: str
    """What the response or text has there."""
    candidate_token: str
    """The candidate's best one."""
    before: str
    """The text before it."""


def worst_prompts(
    table: KLTable, inputs: ForcedInputs, count: int, position_weights: Tensor | None = None
) -> tuple[WorstPrompt, ...]:
    """The prompts of largest mean, the worst one first; those without a finite position left out.

    Args:
        table: of a candidate.
        inputs: the sequences of its rows.
        count: most of them.
        position_weights: (N,), as in `summarize`.
    """
    weights = torch.ones(table.positions) if position_weights is None else position_weights
    weight = (table.mask & ~table.infinite) * weights.double()
    means = torch.where(weight > 0.0, table.values, 0.0).mul(weight).sum(1) / weight.sum(1)
    ordered = [int(i) for i in means.argsort(descending=True, stable=True) if means[i] >= 0.0]
    return tuple(
        WorstPrompt(i + 1, inputs.name(i), float(means[i]), int(table.mask[i].sum()))
        for i in ordered[:count]
    )


def worst_positions(
    table: KLTable, inputs: ForcedInputs, best_tokens: Tensor, count: int
) -> tuple[WorstPosition, ...]:
    """The positions of largest divergence, the worst one first, infinite ones before all.

    Args:
        table: of a candidate.
        inputs: the sequences of its rows.
        best_tokens: (P, N) int64, the candidate's.
        count: most of them.
    """
    values = table.values.masked_fill(table.infinite, torch.inf).masked_fill(~table.mask, -1.0)
    worst = []
    for flat in values.flatten().argsort(descending=True, stable=True)[:count].tolist():
        prompt, position = divmod(flat, table.positions)
        if values[prompt, position] < 0.0:
            break
        worst.append(
            WorstPosition(
                prompt + 1,
                position + 1,
                float(values[prompt, position]),
                float(table.reference_probability[prompt, position]),
                float(table.candidate_probability[prompt, position]),
                inputs.text([inputs.sequences[prompt].response[position]]),
                inputs.text([int(best_tokens[prompt, position])]),
                inputs.before(prompt, position),
            )
        )
    return tuple(worst)
