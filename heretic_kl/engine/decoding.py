"""One batch of sequences in the model's cache, some tokens a row at a time. Chooses no token.

A row may be fed tokens that are only guessed. Those that turn out wrong are masked out of the
cache and their places left empty; positions are counted apart from places, so nothing else changes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from heretic_kl.engine.trunk import PREFIX, WHOLE, Start
from heretic_kl.model import (
    CausalModel,
    PrefixCache,
    common_prefix,
    grows_plainly,
    left_padded,
    new_cache,
)


def guessing_problem(lm: CausalModel) -> str | None:
    """Why guessed tokens could not be taken back; None: they can."""
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return "the model counts positions itself"
    if not grows_plainly(new_cache(lm)):
        return "its cache does not keep all keys and values"
    return None


class Decoding:
    """Which rows are in the cache, and what the model says after the last tokens.

    Reads the sequences when it is made.

    Args:
        lm: the model, edited or not.
        sequences: token ids of the prompts, one batch.
        guesses: tokens of each sequence's answer to be fed at once; may differ in number.
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
        share_prefix: bool,
        start: Start = WHOLE,
        batch: int = 0,
    ) -> None:
        count, candidates = len(sequences), start.candidates
        self.rows = list(range(count * candidates))
        """Rows still in the batch; of several candidates those of the first one first."""
        self._lane_rows = count
        self._lanes = start.lanes
        self._lm = lm
        self._known = frozenset(inspect.signature(lm.model.forward).parameters)
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
            self._cache: Any = kept.expanded(lm, count)
            self._forward(tokens, positions)
        start.complete_cache(batch, self._cache)

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
        if self._lanes is not None:
            self._lanes.set_rows([row // self._lane_rows for row in self.rows])
        self._mask = self._mask[index]
        self._position = self._position[index]
        self._cache.reorder_cache(index)  # each layer moves the index to its own device

    def _forward(self, tokens: Tensor, positions: Tensor) -> None:
        wanted = 1 + self._guessed
        optional = {"position_ids": positions, "logits_to_keep": wanted}
        output = self._lm.model(
            input_ids=tokens,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._known},
        )
        self._logits: Tensor = output.logits[:, -wanted:]


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (B, G) padded on the right with 0, and 1 where they are real; G may be 0."""
    width = max(len(row) for row in rows)
    tokens = [[*row, *[0] * (width - len(row))] for row in rows]
    real = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    shape = (len(rows), width)
    as_ids = torch.tensor(tokens, dtype=torch.int64, device=device).reshape(shape)
    return as_ids, torch.tensor(real, dtype=torch.int64, device=device).reshape(shape)
