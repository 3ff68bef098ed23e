"""How refusals begin, mined from responses, and the probability that a model begins so.

An opening is the shortest beginning of token ids that refusals have and other responses have not.
Where refusals begin with a token that nothing else begins with, it is that token; where both may
begin with "I", it is "I can't". Knows no model and no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

Tokens = tuple[int, ...]

MAX_DEPTH = 6
"""Tokens of the longest opening."""
MIN_COUNT = 2
"""Refusals that must share a beginning for it to be an opening."""
PURITY = 0.6
"""Least share of refusals among responses with a beginning, both kinds weighed alike.

At 0.9 openings of the demo model went deeper and were evaded more often."""


class OpeningNode(NamedTuple):
    """A beginning of openings."""

    prefix: Tokens
    ends: Tokens
    """Tokens with which it becomes an opening; none where it goes on."""


@dataclass(frozen=True)
class OpeningSet:
    """Openings of which none begins with another."""

    openings: tuple[Tokens, ...]

    @cached_property
    def nodes(self) -> tuple[OpeningNode, ...]:
        """All beginnings of openings, after which a distribution must be read; shortest first."""
        ends: dict[Tokens, list[int]] = {}
        for opening in self.openings:
            for depth in range(len(opening)):
                ends.setdefault(opening[:depth], [])
            ends[opening[:-1]].append(opening[-1])
        ordered = sorted(ends.items(), key=lambda item: (len(item[0]), item[0]))
        return tuple(OpeningNode(prefix, tuple(tokens)) for prefix, tokens in ordered)

    @cached_property
    def contexts(self) -> tuple[Tokens, ...]:
        """Beginnings to feed: every node is one of these, or begins one of them."""
        prefixes = [node.prefix for node in self.nodes]
        longer = {q[:depth] for q in prefixes for depth in range(len(q))}
        return tuple(prefix for prefix in prefixes if prefix not in longer)


def mine_openings(
    refusals: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
    *,
    max_depth: int = MAX_DEPTH,
    min_count: int = MIN_COUNT,
    purity: float = PURITY,
) -> OpeningSet:
    """Shortest beginnings that tell refusals from other responses.

    Args:
        refusals: token ids of responses that refuse.
        others: token ids of responses that do not.
        max_depth: tokens of the longest opening; there a beginning counts whatever its purity.
        min_count: refusals that must share a beginning, unless there are fewer refusals in all.
        purity: share of refusals among responses with a beginning from which on it is an opening,
            both kinds weighed alike.

    Raises:
        ValueError: there are no refusals.
    """
    if not refusals:
        raise ValueError("there are no refusals to learn openings from")
    weight = len(refusals) / max(1, len(others))
    fewest = min(min_count, len(refusals))
    openings: list[Tokens] = []

    def descend(prefix: Tokens, refused: list[Tokens], answered: list[Tokens]) -> None:
        depth = len(prefix)
        for token in sorted({r[depth] for r in refused if len(r) > depth}):
            ours = [r for r in refused if len(r) > depth and r[depth] == token]
            theirs = [a for a in answered if len(a) > depth and a[depth] == token]
            if len(ours) < fewest:
                continue
            share = len(ours) / (len(ours) + weight * len(theirs))
            if share >= purity or depth + 1 == max_depth:
                openings.append((*prefix, token))
            else:
                descend((*prefix, token), ours, theirs)

    descend((), [tuple(r) for r in refusals], [tuple(a) for a in others])
    if not openings:  # every beginning is rare: the commonest first token must do
        firsts = [r[0] for r in refusals if len(r)]
        openings.append((max(sorted(set(firsts)), key=firsts.count),))
    return OpeningSet(tuple(openings))


def opening_log_mass(
    openings: OpeningSet,
    log_probabilities: Sequence[Tensor],  # one (P, V) for each node, in the order of `nodes`
) -> Tensor:
    """Log probability (P,) that a response begins with one of the openings.

    The sum over openings of the product over their tokens, by the chain rule.
    """
    at = {node.prefix: rows for node, rows in zip(openings.nodes, log_probabilities, strict=True)}
    terms = []
    for node in openings.nodes:
        reach: Tensor | float = 0.0
        for depth, token in enumerate(node.prefix):
            reach = reach + at[node.prefix[:depth]][:, token]
        if node.ends:
            terms.append(at[node.prefix][:, list(node.ends)].logsumexp(dim=-1) + reach)
    return torch.stack(terms).logsumexp(dim=0)
