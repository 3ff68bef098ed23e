"""One batch of sequences in the model's cache, one token a row at a time. Chooses no token."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from heretic_kl.model.causal_model import CausalModel
from heretic_kl.model.forward.layer_cache import PREFIX, WHOLE, Start
from heretic_kl.model.forward.padding import left_padded, right_padded
from heretic_kl.model.forward.prefix_cache import PrefixCache, common_prefix, has_places


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

    Reads the sequences when it is made, as the model's capabilities allow.

    Args:
        lm: the model, edited or not.
        sequences: token ids of the prompts, one batch.
        most: tokens that a response can have; a prefix is shared where that leaves room for them.
        start: which layers read the sequences, for which candidates.
        batch: which batch of the start's layer cache this is.
    """

    def __init__(
        self,
        lm: CausalModel,
        sequences: Sequence[Sequence[int]],
        most: int,
        start: Start = WHOLE,
        batch: int = 0,
    ) -> None:
        count, candidates = len(sequences), start.candidates
        self.rows = list(range(count * candidates))
        """Rows still in the batch; of several candidates those of the first one first."""
        self._rows_of_candidate = count
        self._candidate_rows = start.candidate_rows
        self._lm = lm
        entry = getattr(lm.body, "forward", lm.model.forward)
        self._arguments = frozenset(inspect.signature(entry).parameters)
        shared = lm.capabilities.shares_prefix_in_cache(sequences, most)
        prefix = common_prefix(sequences) if shared else ()
        with start.batch(PREFIX - batch, 1) if prefix else nullcontext():
            prefix_cache = PrefixCache(lm, prefix, rows=candidates)
        start.complete_prefix(prefix_cache, batch)
        length = prefix_cache.length
        tokens, mask = left_padded([s[length:] for s in sequences], lm.device)
        tokens, mask = tokens.repeat(candidates, 1), mask.repeat(candidates, 1)
        self._mask = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
        positions = (length + mask.cumsum(dim=1) - 1).clamp_min(length)
        self._position = self._mask.sum(1, keepdim=True)
        cached = lm.capabilities.cache_problem is None
        with start.batch(batch, count):
            self._cache: Any = prefix_cache.expanded(lm, count) if cached else WithoutCache()
            self._forward(tokens, positions)
        start.complete_cache(batch, self._cache, count)

    @property
    def logits(self) -> Tensor:
        """(rows, V) of the next token."""
        return self._logits

    def advance(self, chosen: Sequence[int]) -> None:
        """Feed every row its next token."""
        tokens = torch.tensor(chosen, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(tokens)], dim=1)
        self._forward(tokens, self._position)
        self._position = self._position + 1

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all other rows from the batch and its cache."""
        index = torch.tensor(indices, device=self._mask.device)
        self.rows = [self.rows[i] for i in indices]
        if self._candidate_rows is not None:
            self._candidate_rows.set_rows([row // self._rows_of_candidate for row in self.rows])
        self._mask = self._mask[index]
        self._position = self._position[index]
        self._cache.reorder_cache(index)  # each layer moves the index to its own device

    def _forward(self, tokens: Tensor, positions: Tensor) -> None:
        if isinstance(self._cache, WithoutCache):
            self._logits: Tensor = self._cache.logits(self._lm, tokens, self._mask)
            return
        optional = {"position_ids": positions, "attention_mask": self._mask}
        if tokens.shape[1] == 1 and not has_places(self._cache):
            del optional["attention_mask"]
        output = self._lm.body(
            input_ids=tokens,
            use_cache=True,
            **{self._lm.capabilities.cache_argument: self._cache},
            **{name: value for name, value in optional.items() if name in self._arguments},
        )
        # Two dimensions: of some three-dimensional inputs a product copies the weight for each row.
        self._logits = self._lm.head.logits(output.last_hidden_state[:, -1])
