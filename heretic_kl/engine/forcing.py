"""Final hidden states at scored positions, teacher-forced. Knows nothing about divergences.

Sequences are padded on the right and run without an attention mask: under causal attention a
padded position cannot change one before it. What all prompts begin with runs once a candidate.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine.batching import length_buckets
from heretic_kl.engine.trunk import PREFIX, WHOLE, Start
from heretic_kl.model import CausalModel, PrefixCache, common_prefix, right_padded

PORTION_ROWS = 64
"""Scored rows that are worth a matrix product with the head."""
ORDER_SEED = 0
"""Of the order in which batches run, the same for all models."""


@dataclass(frozen=True)
class ForcedSequence:
    """A prompt and the answer it is forced to have."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """N tokens; each is predicted at a scored position, the last one is not fed."""

    @property
    def fed(self) -> tuple[int, ...]:
        """What goes into the model: everything but the last answer token."""
        return self.prompt + self.answer[:-1]

    @property
    def scored(self) -> range:
        """Positions whose logits predict the answer tokens."""
        return range(len(self.prompt) - 1, len(self.prompt) - 1 + len(self.answer))


class ForcedBatch(NamedTuple):
    """One rectangle of tokens and where its scored positions go."""

    tokens: Tensor  # (B, T) int64, after the shared prefix, padded with 0
    row: Tensor  # (scored,) int64, in the batch
    position: Tensor  # (scored,) int64, in the row
    target: Tensor  # (scored,) int64, among all scored rows


class ForcedBatches:
    """Sequences laid out once: the reference and every candidate run in the same batches.

    Args:
        sequences: what to feed; a prompt of at least one token each.
        max_rows: most sequences in a batch.
        share_prefix: run the tokens that all prompts begin with once.
        extra_padding: padding added to every batch, to measure what padding changes.
    """

    def __init__(
        self,
        sequences: Sequence[ForcedSequence],
        max_rows: int,
        *,
        share_prefix: bool = True,
        extra_padding: int = 0,
    ) -> None:
        self.max_rows = max_rows
        self.prefix = common_prefix([s.prompt for s in sequences]) if share_prefix else ()
        skipped = len(self.prefix)
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence.answer))
        self.rows = starts[-1]
        rest = [s.fed[skipped:] for s in sequences]
        self.batches: list[ForcedBatch] = []
        buckets = length_buckets([len(ids) for ids in rest], max_rows)
        # Not by length: the first ones speak for all, to whoever stops early.
        random.Random(ORDER_SEED).shuffle(buckets)
        for bucket in buckets:
            tokens, _last = right_padded([rest[index] for index in bucket], torch.device("cpu"))
            if extra_padding:
                tokens = torch.nn.functional.pad(tokens, (0, extra_padding))
            places = [
                (row, position - skipped, starts[index] + step)
                for row, index in enumerate(bucket)
                for step, position in enumerate(sequences[index].scored)
            ]
            self.batches.append(ForcedBatch(tokens, *torch.tensor(places).unbind(-1)))

    @property
    def fed_tokens(self) -> int:
        """Positions that a pass computes, padding included, the prefix once."""
        return len(self.prefix) + sum(batch.tokens.numel() for batch in self.batches)


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


def run_forced(lm: CausalModel, batches: ForcedBatches, start: Start = WHOLE) -> Tensor:
    """Hidden states after the final norm at every scored position.

    Args:
        lm: the model, edited or not.
        batches: what to feed.
        start: which layers run, for which candidates.

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
    found = list(portions)
    rows = torch.cat([portion.rows for portion in found])
    hidden = torch.cat([portion.hidden for portion in found], dim=1)
    ordered = torch.empty_like(hidden)
    ordered[:, rows.to(hidden.device)] = hidden
    return ordered


@torch.no_grad()
def forced_portions(
    lm: CausalModel, batches: ForcedBatches, start: Start = WHOLE
) -> Iterator[ForcedPortion]:
    """The same bit by bit, `PORTION_ROWS` rows or a few more at a time.

    Which rows come together depends on the batches alone.
    """
    count = start.candidates
    with start.batch(PREFIX, 1) if batches.prefix else nullcontext():
        kept = PrefixCache(lm, batches.prefix, rows=count)
    start.complete_prefix(kept)
    waiting: list[tuple[Tensor, Tensor]] = []
    for index, batch in enumerate(batches.batches):
        size = batch.tokens.shape[0]
        tokens = batch.tokens.to(lm.device).repeat(count, 1)
        with start.batch(index, size):
            arguments = kept.arguments(lm, size)
            hidden = lm.body(input_ids=tokens, **arguments).last_hidden_state
        device = hidden.device
        by_candidate = hidden.unflatten(0, (count, size))
        scored = by_candidate[:, batch.row.to(device), batch.position.to(device)]
        waiting.append((batch.target, scored.to(lm.head.weight.device)))
        last = index + 1 == len(batches.batches)
        if last or sum(len(rows) for rows, _ in waiting) >= PORTION_ROWS:
            targets, states = zip(*waiting, strict=True)
            yield ForcedPortion(torch.cat(targets), torch.cat(states, dim=1))
            waiting.clear()
