"""Sequences as one tree of tokens: what several of them begin with stands in it once.

Under a causal model a token's states depend on the tokens before it alone, so sequences that begin
alike share them up to where they part. Knows no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl.model.forward.tree_attention import TreeRectangle

FEWEST_ROWS = 8
"""A rectangle of fewer costs more to start than it saves in padding."""
MAX_PADDING = 0.35
"""Share of a rectangle's scores that may be of no use."""
MAX_SCORES = 2**18
"""Scores of one head in one rectangle, unless a single row needs more."""


class TokenTree:
    """Tokens in an order in which each comes after the one before it in its sequences.

    Args:
        sequences: of at least one token each; more can be added.
    """

    def __init__(self, sequences: Sequence[Sequence[int]] = ()) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        """Of each token in its sequences."""
        self.paths: list[tuple[int, ...]] = []
        """Of each sequence, which of the tokens it is made of."""
        self._nodes: dict[tuple[int, int], int] = {}  # (the node before or -1, token) -> node
        for sequence in sequences:
            self.add(sequence)

    def add(self, sequence: Sequence[int]) -> None:
        """Put another sequence in."""
        path: list[int] = []
        for position, token in enumerate(sequence):
            before = path[-1] if path else -1
            node = self._nodes.setdefault((before, token), len(self.tokens))
            if node == len(self.tokens):
                self.tokens.append(token)
                self.positions.append(position)
            path.append(node)
        self.paths.append(tuple(path))


class _Run(NamedTuple):
    """Some tokens that follow each other, and all that they see."""

    path: tuple[int, ...]
    queries: tuple[int, ...]  # its last ones


def tree_rectangles(tree: TokenTree) -> list[TreeRectangle]:
    """Who attends to whom, each token once as a query, in rectangles of runs of like size."""
    runs = sorted(_runs(tree), key=lambda run: (len(run.queries), len(run.path)))
    groups: list[list[_Run]] = []
    useful = 0
    for run in runs:
        group = groups[-1] if groups else []
        scores = len(run.queries) * len(run.path)
        rows = len(group) + 1
        area = rows * len(run.queries) * max(len(run.path), *(len(r.path) for r in group), 0)
        wasteful = rows > FEWEST_ROWS and (useful + scores) / area < 1 - MAX_PADDING
        if not group or wasteful or area > MAX_SCORES:
            groups.append([])
            useful = 0
        groups[-1].append(run)
        useful += scores
    positions = torch.tensor(tree.positions)
    return [_rectangle(group, positions) for group in groups]


def _runs(tree: TokenTree) -> Iterator[_Run]:
    """Each sequence's tokens that no earlier one has; what all share is a run of its own."""
    placed = 0
    common = len(os.path.commonprefix(tree.paths)) if len(tree.paths) > 1 else 0
    for path in tree.paths:
        # A tree is numbered as it grows: what a sequence adds stands at its end.
        new = next((index for index, node in enumerate(path) if node >= placed), len(path))
        if new == 0 and 0 < common < len(path):
            yield _Run(path[:common], path[:common])
            new = common
        if new < len(path):
            yield _Run(path, path[new:])
            placed = path[-1] + 1


def _rectangle(runs: Sequence[_Run], positions: Tensor) -> TreeRectangle:
    queries = _padded([run.queries for run in runs])
    keys = _padded([run.path for run in runs])
    lengths = torch.tensor([len(run.queries) for run in runs])
    # A key's place in its row is its position in the sequence.
    return TreeRectangle(queries, keys, positions[queries] + 1, lengths)


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, longest) int64, filled up with each row's first."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[row[0]] * (longest - len(row))] for row in rows])
