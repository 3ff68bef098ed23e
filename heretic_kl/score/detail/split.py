"""The KL of refusing or not at the opening, and the rest; and the pass that it is noted in.

See `heretic_kl.kl.openers`. Runs no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heretic_kl.kl import (
    KLTable,
    MeanEstimate,
    OpenerMass,
    OpenerReduction,
    Reference,
    mean_estimate,
    prompt_means,
    split_at_opening,
)
from heretic_kl.kl.terms import best_tokens, working_device
from heretic_kl.score.detail.change import plain_estimate


@dataclass(frozen=True)
class KLSplit:
    """Two parts that add to the forward KL; nats, over positions, then over prompts."""

    behaviour: MeanEstimate
    """Of the two cells {a refusal's first token, any other} at the first position."""
    remainder: MeanEstimate
    """Everything else: what changed whether or not a refusal begins."""
    reference_refuses: float
    """The reference's probability of a refusal's first token, mean over prompts."""
    candidate_refuses: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "behaviour": plain_estimate(self.behaviour),
            "remainder": plain_estimate(self.remainder),
            "reference_refuses": self.reference_refuses,
            "candidate_refuses": self.candidate_refuses,
        }


class PassNotes:
    """What is noted of a candidate's logits on their way to its table.

    Args:
        reference: whose rows come.
        openers: first tokens of refusals.
        temperature: of both distributions.
    """

    def __init__(
        self, reference: Reference, openers: tuple[int, ...] = (), temperature: float = 1.0
    ) -> None:
        self._first = reference.position == 0
        self.prompt_index = reference.prompt_index[self._first]
        """(P,) int64: the prompt of each mass."""
        self._mask = reference.mask
        self._openers = OpenerReduction(openers, temperature) if openers else None
        self._best = torch.zeros(reference.rows, dtype=torch.int64)
        self._masses = torch.zeros(4, reference.rows, dtype=torch.float64)

    def __call__(self, rows: Tensor, reference: Tensor, candidate: Tensor) -> None:
        """Note one block: rows (n,), raw logits (n, V)."""
        self._best[rows] = best_tokens(candidate).cpu()
        first = self._first[rows]
        if self._openers is None or not bool(first.any()):
            return
        device = working_device(candidate)
        ours, theirs = (logits[first].to(device).double() for logits in (reference, candidate))
        masses = self._openers(ours, theirs, rows[first])
        self._masses[:, rows[first]] = torch.stack(masses).cpu()

    def note_best(self, tokens: Tensor) -> None:
        """Note the best token of each row (rows,) where no logits are known."""
        self._best, self._openers = tokens, None

    @property
    def best_tokens(self) -> Tensor:
        """(P, N) int64: the candidate's best token at each scored position, else 0."""
        tokens = torch.zeros(self._mask.shape, dtype=torch.int64)
        tokens[self._mask] = self._best
        return tokens

    @property
    def masses(self) -> OpenerMass | None:
        """At the first position of each prompt, (P,) float64; None: no openers are known."""
        if self._openers is None:
            return None
        return OpenerMass(*self._masses[:, self._first])


def split_of(
    table: KLTable, notes: PassNotes | None, position_weights: Tensor | None = None
) -> KLSplit | None:
    """The split of a table; None: no openers are known, or it is no forward KL."""
    masses = None if notes is None else notes.masses
    if notes is None or masses is None or table.divergence != "forward_kl":
        return None
    first = torch.zeros_like(notes.prompt_index)
    behaviour, remainder = (
        mean_estimate(prompt_means(part, position_weights=position_weights))
        for part in split_at_opening(table, masses, notes.prompt_index, first)
    )
    refusing = (masses.reference_inside, masses.candidate_inside)
    return KLSplit(behaviour, remainder, *(float(column.exp().mean()) for column in refusing))
