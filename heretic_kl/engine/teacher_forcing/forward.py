"""Final hidden states at scored positions, teacher-forced. Knows nothing about divergences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine.teacher_forcing.batches import ForcedBatch, ForcedBatches, ForcedSequence
from heretic_kl.model import PREFIX, WHOLE, CausalModel, PrefixCache, Start, run_tree

PORTION_ROWS = 64
"""Scored rows that are worth a matrix product with the head."""


def forced_hidden_states(
    lm: CausalModel,
    sequences: Sequence[ForcedSequence],
    max_rows: int,
    *,
    share_prefix: bool = True,
    extra_padding: int = 0,
) -> Tensor:
    """Hidden states of one model at every scored position; see `ForcedBatches` and `run_forced`.

    Returns:
        (rows, D).
    """
    batches = ForcedBatches(
        sequences, max_rows, share_prefix=share_prefix, extra_padding=extra_padding
    )
    return run_forced(lm, batches)[0]


@torch.no_grad()
def run_forced(lm: CausalModel, batches: ForcedBatches, start: Start = WHOLE) -> Tensor:
    """Hidden states after the final norm at every scored position.

    Returns:
        (K, rows, D) in the model's dtype and on its head's device, sequence by sequence, position
        by position.
    """
    return gathered(forced_portions(lm, batches, start))


class ForcedPortion(NamedTuple):
    """Some whole sequences of a pass."""

    rows: Tensor  # (n,) int64, among all scored rows
    hidden: Tensor  # (K, n, D)


def gathered(portions: Iterable[ForcedPortion]) -> Tensor:
    """All portions of a pass as (K, rows, D), rows in order."""
    parts = list(portions)
    rows = torch.cat([portion.rows for portion in parts])
    hidden = torch.cat([portion.hidden for portion in parts], dim=1)
    ordered = torch.empty_like(hidden)
    ordered[:, rows.to(hidden.device)] = hidden
    return ordered


def forced_portions(
    lm: CausalModel, batches: ForcedBatches, start: Start = WHOLE
) -> Iterator[ForcedPortion]:
    """The same bit by bit, `PORTION_ROWS` rows or a few more at a time.

    Which rows come together depends on the batches alone. Measuring calls it under `no_grad`.
    """
    prefix_cache = _read_prefix(lm, batches, start)
    waiting: list[tuple[Tensor, Tensor]] = []
    for index in range(len(batches.batches)):
        waiting.append(_scored(lm, batches, index, prefix_cache, start))
        last = index + 1 == len(batches.batches)
        if last or sum(len(rows) for rows, _ in waiting) >= PORTION_ROWS:
            targets, states = zip(*waiting, strict=True)
            yield ForcedPortion(torch.cat(targets), torch.cat(states, dim=1))
            waiting.clear()


def _read_prefix(lm: CausalModel, batches: ForcedBatches, start: Start) -> PrefixCache:
    with start.batch(PREFIX, 1) if batches.prefix else nullcontext():
        prefix_cache = PrefixCache(lm, batches.prefix, rows=start.candidates)
    start.complete_prefix(prefix_cache)
    return prefix_cache


def _scored(
    lm: CausalModel, batches: ForcedBatches, index: int, prefix_cache: PrefixCache, start: Start
) -> tuple[Tensor, Tensor]:
    """Scored rows (n,) of one batch and their hidden states (K, n, D)."""
    batch = batches.batches[index]
    size = batch.tokens.shape[0]
    with start.batch(index, size):
        hidden = _run_batch(lm, batch, prefix_cache)
    by_candidate = hidden.view(start.candidates, size, *hidden.shape[1:])
    device = hidden.device
    scored = by_candidate[:, batch.row.to(device), batch.position.to(device)]
    return batch.target, scored.to(lm.head.weight.device)


def _run_batch(lm: CausalModel, batch: ForcedBatch, prefix_cache: PrefixCache) -> Tensor:
    """Final hidden states of all rows of a batch, candidate by candidate, (K * B, T, D)."""
    tokens = batch.tokens.to(lm.device).repeat(prefix_cache.rows, 1)
    if batch.tree is None or batch.positions is None:
        arguments = prefix_cache.arguments(lm, batch.tokens.shape[0])
        hidden: Tensor = lm.body(input_ids=tokens, **arguments).last_hidden_state
        return hidden
    return run_tree(lm, tokens, batch.positions, batch.tree)
