"""Prompts with forced responses laid out in batches, the same for the reference and all candidates.

Either as rectangles padded on the right, without an attention mask (under causal attention a padded
position cannot change one before it), where what all prompts begin with runs once a candidate; or
as trees of tokens, where whatever several sequences of a batch begin with runs once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine.length_buckets import length_buckets
from heretic_kl.model import (
    TokenTree,
    TreeAttention,
    common_prefix,
    right_padded,
    tree_rectangles,
)

ORDER_SEED = 0
"""Of the order in which batches run, the same for all models."""


@dataclass(frozen=True)
class ForcedSequence:
    """A prompt and the response it is forced to have."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """N tokens; each is predicted at a scored position, the last one is not fed."""

    @property
    def fed(self) -> tuple[int, ...]:
        """What goes into the model: everything but the last response token."""
        return self.prompt + self.response[:-1]

    @property
    def scored(self) -> range:
        """Positions whose logits predict the response tokens."""
        return range(len(self.prompt) - 1, len(self.prompt) - 1 + len(self.response))


class ForcedBatch(NamedTuple):
    """Some tokens and where their scored positions go."""

    tokens: Tensor  # (B, T) int64, after the shared prefix, padded with 0; of a tree (1, M)
    row: Tensor  # (scored,) int64, in the batch
    position: Tensor  # (scored,) int64, in the row
    target: Tensor  # (scored,) int64, among all scored rows
    positions: Tensor | None = None  # (M,) int64, of a tree's tokens in their sequences
    tree: TreeAttention | None = None


class ForcedBatches:
    """Sequences laid out once: the reference and every candidate run in the same batches.

    Args:
        sequences: what to feed; a prompt of at least one token each.
        max_rows: most sequences in a rectangle.
        share_prefix: run the tokens that all prompts begin with once.
        tree_tokens: lay out trees instead, of at most so many tokens, unless one sequence has more.
        extra_padding: padding added to every batch, to measure what padding changes.
    """

    def __init__(
        self,
        sequences: Sequence[ForcedSequence],
        max_rows: int,
        *,
        share_prefix: bool = True,
        tree_tokens: int | None = None,
        extra_padding: int = 0,
    ) -> None:
        self.max_rows = max_rows
        self._tree_tokens = tree_tokens
        shared = share_prefix and tree_tokens is None
        self.prefix = common_prefix([s.prompt for s in sequences]) if shared else ()
        starts = [0]
        for sequence in sequences:
            starts.append(starts[-1] + len(sequence.response))
        self.rows = starts[-1]
        if tree_tokens is None:
            batches = _rectangles(sequences, starts, self.prefix, max_rows, extra_padding)
        else:
            batches = _trees(sequences, starts, tree_tokens)
        self.batches = list(batches)

    def candidates_at_once(self, candidates: int) -> int:
        """How many of so many candidates are worth running side by side.

        Of trees as many as fit in the size of one: batches of that size gain nothing more from
        being larger.
        """
        if self._tree_tokens is None:
            return candidates
        largest = max(batch.tokens.numel() for batch in self.batches)
        return max(1, min(candidates, self._tree_tokens // largest))

    @property
    def fed_tokens(self) -> int:
        """Positions that a pass computes, padding included, the prefix once."""
        return len(self.prefix) + sum(batch.tokens.numel() for batch in self.batches)


def _rectangles(
    sequences: Sequence[ForcedSequence],
    starts: Sequence[int],
    prefix: Sequence[int],
    max_rows: int,
    extra_padding: int,
) -> Iterator[ForcedBatch]:
    skipped = len(prefix)
    rest = [s.fed[skipped:] for s in sequences]
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
        row, position, target = torch.tensor(places).unbind(-1)
        yield ForcedBatch(tokens, row, position, target)


def _trees(
    sequences: Sequence[ForcedSequence], starts: Sequence[int], most: int
) -> Iterator[ForcedBatch]:
    for chosen, tree in _parted(sequences, most):
        places = [
            (path[position], starts[index] + step)
            for index, path in zip(chosen, tree.paths, strict=True)
            for step, position in enumerate(sequences[index].scored)
        ]
        position, target = torch.tensor(places).unbind(-1)
        yield ForcedBatch(
            torch.tensor([tree.tokens]),
            torch.zeros_like(position),
            position,
            target,
            torch.tensor(tree.positions),
            TreeAttention(tree_rectangles(tree), len(tree.tokens)),
        )


def _parted(sequences: Sequence[ForcedSequence], most: int) -> list[tuple[list[int], TokenTree]]:
    """Sequences by index and their trees: of about equal size, of at most so many tokens.

    In about as few parts as that takes; a sequence that is longer is one by itself.
    """
    order = list(range(len(sequences)))
    # The first ones speak for all, to whoever stops early.
    random.Random(ORDER_SEED).shuffle(order)
    fed = [sequence.fed for sequence in sequences]
    alone = [[index] for index in order if len(fed[index]) >= most]
    order = [index for index in order if len(fed[index]) < most]
    # A tree of all is no larger than the trees of its parts together.
    count = max(1, -(-len(TokenTree([fed[index] for index in order]).tokens) // most))
    while True:
        parts = _equal_parts(order, [len(ids) for ids in fed], count)
        trees = [TokenTree([fed[index] for index in part]) for part in parts]
        if all(len(tree.tokens) <= most for tree in trees) or count >= len(order):
            break
        count = min(len(order), count + 1 + count // 20)
    trees += [TokenTree([fed[index] for index in part]) for part in alone]
    return [(part, tree) for part, tree in zip(parts + alone, trees, strict=True) if part]


def _equal_parts(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """The order cut where about so many tokens are reached as each part should have."""
    whole = sum(lengths[index] for index in order)
    parts: list[list[int]] = [[] for _ in range(count)]
    before = 0
    for index in order:
        middle = before + lengths[index] / 2
        parts[min(count - 1, int(middle * count / whole))].append(index)
        before += lengths[index]
    return parts
