"""The KL split at the first token: what a set of tokens has of it, and the rest.

By the chain rule the KL of the first position is that of two cells, in the set or not,
plus that within the cells. With the first tokens of refusals as the set, the two cells say how much
the tendency to refuse changed, which may be the aim of an edit; the rest says what else changed.
Knows nothing about refusals.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.kl.table import KLTable
from heretic_kl.kl.terms import working_dtype


class OpenerMass(NamedTuple):
    """Log probability, row by row, of a token of the set and of any other; each (rows,) float64."""

    reference_inside: Tensor
    reference_outside: Tensor
    candidate_inside: Tensor
    candidate_outside: Tensor


@dataclass(frozen=True)
class OpenerReduction:
    """Reduces rows of logits to the mass of a set of tokens; equal options are equal requests."""

    tokens: tuple[int, ...]
    temperature: float = 1.0

    @torch.no_grad()
    def __call__(self, reference: Tensor, candidate: Tensor, tokens: Tensor) -> OpenerMass:
        """Masses of rows of raw logits (rows, V), in float64 if they are; no tokens are needed."""
        return OpenerMass(*self._masses(reference), *self._masses(candidate))

    def _masses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(self.tokens, device=logits.device)
        scaled = logits.to(working_dtype(logits.dtype, logits.dtype)) / self.temperature
        inside = scaled[:, chosen].logsumexp(dim=-1)
        outside = scaled.index_fill(1, chosen, float("-inf")).logsumexp(dim=-1)
        both = torch.stack([inside, outside]).double().log_softmax(dim=0)
        return both[0], both[1]


class SplitKL(NamedTuple):
    """Two tables whose values add to the whole's."""

    behaviour: KLTable
    """At the first position the KL of the two cells, 0 elsewhere."""
    remainder: KLTable


def split_at_opening(
    table: KLTable,
    masses: OpenerMass,
    prompt_index: Tensor,  # (rows,) integer in [0, P)
    position: Tensor,  # (rows,) integer in [0, N)
) -> SplitKL:
    """Split a table of forward KL, exactly: both parts are never negative (log-sum inequality).

    Args:
        table: forward KL(reference || candidate), at the temperature of the masses.
        masses: of the same rows.
        prompt_index: of each row.
        position: of each row.

    Raises:
        ValueError: the table holds another divergence.
    """
    if table.divergence != "forward_kl":
        raise ValueError(f"only forward_kl is split, got {table.divergence}")
    first = (position == 0).cpu()
    inside, outside, other_inside, other_outside = (column.cpu()[first] for column in masses)
    cells = _summand(inside, other_inside) + _summand(outside, other_outside)
    behaviour = torch.zeros_like(table.values)
    behaviour[prompt_index.cpu()[first], 0] = cells.clamp_min(0)
    behaviour = torch.minimum(behaviour, table.values)  # they may differ in the last bits
    remainder = torch.where(table.infinite, table.values, table.values - behaviour)
    return SplitKL(replace(table, values=behaviour), replace(table, values=remainder))


def _summand(reference: Tensor, candidate: Tensor) -> Tensor:
    """P * log(P / Q) of log probabilities; 0 where P is 0, +inf where only Q is."""
    return torch.where(reference.isneginf(), 0.0, reference.exp() * (reference - candidate))
