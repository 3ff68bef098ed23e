"""One batch of sequences in the model's cache, some tokens a row at a time. Chooses no token.

A row may be fed tokens that are only guessed. Those that turn out wrong are masked out of the
cache and their places left empty; positions are counted apart from places, so nothing else changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine.layer_cache import PREFIX, WHOLE, Start
from heretic_kl.model import (
    CausalModel,
    PrefixCache,
    cache_argument,
    common_prefix,
    grows_plainly,
    has_places,
    left_padded,
    new_cache,
    right_padded,
)


class Continuing(NamedTuple):
    """What of a model's cache can be used; see `heretic_kl.engine.generation.cache_check`."""

    cached: bool
    """Rows of different lengths, padded on the left, can grow in it, and leave."""
    gaps: bool
    """Places between tokens can be masked out: padding behind a common prefix."""
    window: int | None = None
    """Some layer sees so many places back, gaps included; None: all see everything."""
    problem: str | None = None
    """Why there is no cache; None: there is."""

    def shares_prefix(self, sequences: Sequence[Sequence[int]], most: int) -> bool:
        """Whether sequences can grow by so many tokens behind what they have in common."""
        lengths = [len(sequence) for sequence in sequences]
        if not self.cached or min(lengths) == max(lengths):
            return self.cached and self.gaps
        return self.gaps and (self.window is None or max(lengths) + most <= self.window)


def guessing_problem(lm: CausalModel, way: Continuing) -> str | None:
    """Why guessed tokens could not be taken back; None: they can."""
    if not way.cached:
        return "its cache is not used"
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return "the model counts positions itself"
    if not grows_plainly(new_cache(lm)):
        return "its cache does not keep all keys and values"
    if not way.gaps or way.window is not None:
        return "its layers see how far tokens lie apart in the cache"
    return None


class WithoutCache:
    """The tokens so far, in place of a cache: all are read again for each new one."""

    def __init__(self) -> None:
        self._tokens: Tensor | None = None
        self.layers: list[Any] = []

    def reorder_cache(self, indices: Tensor) -> None:
        """Keep these rows."""
        assert self._tokens is not None
        self._tokens = self._tokens[indices]

    def logits(
        self,
        lm: CausalModel,
        tokens: Tensor,  # (B, T) new ones
        mask: Tensor,  # (B, all so far) 1 where a token counts
    ) -> Tensor:
        """(B, V) of the next token."""
        seen = [] if self._tokens is None else [self._tokens]
        self._tokens = torch.cat([*seen, tokens], dim=1)
        pairs = zip(self._tokens, mask.bool(), strict=True)
        fed, last = right_padded([row[real].tolist() for row, real in pairs], lm.device)
        hidden = lm.body(input_ids=fed, use_cache=False).last_hidden_state
        rows = torch.arange(len(last), device=hidden.device)
        return lm.head.logits(hidden[rows, last.to(hidden.device)])


class Decoding:
    """Which rows are in the cache, and what the model says after the last tokens.

    Reads the sequences when it is made.

    Args:
        lm: the model, edited or not.
        sequences: token ids of the prompts, one batch.
        guesses: tokens of each sequence's answer to be fed at once; may differ in number.
        way: what of the model's cache can be used.
        most: tokens that an answer can have; a prefix is shared where that leaves room for them.
        share_prefix: run the tokens that all prompts begin with once.
        start: which layers read the sequences, for which candidates.
        batch: which batch of the start's trunk this is.
    """

    def __init__(
        self,
        lm: CausalModel,
        sequences: Sequence[Sequence[int]],
        guesses: Sequence[Sequence[int]],
        *,
        way: Continuing,
        most: int,
        share_prefix: bool,
        start: Start = WHOLE,
        batch: int = 0,
    ) -> None:
        count, candidates = len(sequences), start.candidates
        self.rows = list(range(count * candidates))
        """Rows still in the batch; of several candidates those of the first one first."""
        self._rows_each = count
        self._candidate_rows = start.candidate_rows
        self._lm = lm
        entered = getattr(lm.body, "forward", lm.model.forward)
        self._known = frozenset(inspect.signature(entered).parameters)
        self._cache_argument = cache_argument(lm)
        share_prefix = share_prefix and way.shares_prefix(sequences, most)
        prefix = common_prefix(sequences) if share_prefix else ()
        with start.batch(PREFIX, 1) if prefix else nullcontext():
            kept = PrefixCache(lm, prefix, rows=candidates)
        start.complete_prefix(kept)
        tokens, own = left_padded([s[kept.length :] for s in sequences], lm.device)
        guessed, real = _right_padded(guesses, lm.device)
        tokens, own = torch.cat([tokens, guessed], dim=1), torch.cat([own, real], dim=1)
        tokens, own = tokens.repeat(candidates, 1), own.repeat(candidates, 1)
        self._mask = torch.cat([own.new_ones(len(own), kept.length), own], dim=1)
        self._guessed = guessed.shape[1]
        positions = (kept.length + own.cumsum(dim=1) - 1).clamp_min(kept.length)
        self._position = self._mask[:, : self._mask.shape[1] - self._guessed].sum(1, keepdim=True)
        with start.batch(batch, count):
            self._cache: Any = kept.expanded(lm, count) if way.cached else WithoutCache()
            self._forward(tokens, positions)
        start.complete_cache(batch, self._cache, count)

    @property
    def logits(self) -> Tensor:
        """(rows, 1 + G, V) of the next token and of those after each of G guessed ones."""
        return self._logits

    def settle(self, accepted: Sequence[int]) -> None:
        """Keep the first of each row's guessed tokens, undo the others.

        Args:
            accepted: how many, by row.
        """
        if not self._guessed:
            return
        count = torch.tensor(accepted, device=self._mask.device)[:, None]
        places = torch.arange(self._guessed, device=self._mask.device)
        self._mask[:, -self._guessed :] = (places < count).to(self._mask.dtype)
        self._position = self._position + count
        empty = self._guessed - max(accepted)
        if empty:
            self._mask = self._mask[:, :-empty]
            for layer in self._cache.layers:
                if layer.keys is None:
                    continue  # a layer that looks at images did not run
                layer.keys = layer.keys[..., :-empty, :]
                layer.values = layer.values[..., :-empty, :]
        self._guessed = 0

    def advance(self, chosen: Sequence[int], guesses: Sequence[Sequence[int]]) -> None:
        """Feed every row its next token, and those that are guessed to follow."""
        device = self._mask.device
        guessed, real = _right_padded(guesses, device)
        own = torch.tensor(chosen, device=device)[:, None]
        tokens = torch.cat([own, guessed], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(own), real], dim=1)
        self._guessed = guessed.shape[1]
        positions = self._position + torch.arange(tokens.shape[1], device=device)
        self._position = self._position + 1
        self._forward(tokens, positions)

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all other rows from the batch and its cache; nothing may be guessed."""
        index = torch.tensor(indices, device=self._mask.device)
        self.rows = [self.rows[i] for i in indices]
        if self._candidate_rows is not None:
            self._candidate_rows.set_rows([row // self._rows_each for row in self.rows])
        self._mask = self._mask[index]
        self._position = self._position[index]
        self._cache.reorder_cache(index)  # each layer moves the index to its own device

    def _forward(self, tokens: Tensor, positions: Tensor) -> None:
        if isinstance(self._cache, WithoutCache):
            self._logits: Tensor = self._cache.logits(self._lm, tokens, self._mask)[:, None]
            return
        wanted = 1 + self._guessed
        optional = {"position_ids": positions, "attention_mask": self._mask}
        if tokens.shape[1] == 1 and not has_places(self._cache):
            del optional["attention_mask"]
        output = self._lm.body(
            input_ids=tokens,
            use_cache=True,
            **{self._cache_argument: self._cache},
            **{name: value for name, value in optional.items() if name in self._known},
        )
        # Two dimensions: of some three-dimensional inputs a product copies the weight for each row.
        hidden = output.last_hidden_state[:, -wanted:].flatten(0, 1)
        self._logits = self._lm.head.logits(hidden).view(len(tokens), wanted, -1)


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, G) padded on the right with 0, and 1 where they are real; G may be 0."""
    width = max(len(row) for row in rows)
    tokens = [[*row, *[0] * (width - len(row))] for row in rows]
    real = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    shape = (len(rows), width)
    as_ids = torch.tensor(tokens, dtype=torch.int64, device=device).reshape(shape)
    return as_ids, torch.tensor(real, dtype=torch.int64, device=device).reshape(shape)
