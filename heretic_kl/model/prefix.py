"""The tokens that all prompts begin with, run once and kept as keys and values.

System prompt and chat template are often more than half of a short prompt. Under a causal model
what they compute does not depend on what follows, so one row serves all. Knows no prompts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heretic_kl.model.causal import CausalModel
from heretic_kl.model.padding import right_padded

SHORTEST = 8
"""Fewer common tokens are not worth a pass of their own."""
FEWEST_ROWS = 2
TOLERANCE = 2e-2
"""Largest relative difference of hidden states with and without the prefix; 1e-6 in float32."""


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The leading tokens that all sequences share; each keeps at least one token of its own.

    Empty where it would not pay.
    """
    if len(sequences) < FEWEST_ROWS:
        return ()
    shared: list[int] = []
    for column in zip(*(sequence[:-1] for sequence in sequences), strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return tuple(shared) if len(shared) >= SHORTEST else ()


class PrefixCache:
    """Keys and values of one prefix, for batches of any size.

    Computed under the edits that are in force when it is made; valid only for those.

    Args:
        lm: the model.
        tokens: the prefix; may be empty.
        rows: K, candidates that each have a prefix of their own.
    """

    def __init__(self, lm: CausalModel, tokens: Sequence[int], *, rows: int = 1) -> None:
        self.length = len(tokens)
        self.rows = rows
        self._cache: Any = None
        if tokens:
            self._cache = new_cache(lm)
            ids = torch.tensor([list(tokens)] * rows, device=lm.device)
            lm.body(input_ids=ids, past_key_values=self._cache, use_cache=True)

    def take_layers(self, other: PrefixCache, below: int) -> None:
        """Take keys and values of the layers below from another, one-rowed cache."""
        for layer in range(below):
            taken = copied_layer(other._cache.layers[layer])
            if self.rows > 1:
                taken.batch_repeat_interleave(self.rows)
            self._cache.layers[layer] = taken

    def arguments(self, lm: CausalModel, rows: int) -> dict[str, Any]:
        """What to pass to the model's body for the rest of `rows` sequences a candidate."""
        if self._cache is None:
            return {"use_cache": False}
        return {"past_key_values": self.expanded(lm, rows), "use_cache": True}

    def expanded(self, lm: CausalModel, rows: int) -> Any:
        """A cache of `rows` rows a candidate that begins with the prefix; it may be changed."""
        if self._cache is None:
            return new_cache(lm)
        cache = copy.copy(self._cache)
        cache.layers = [copied_layer(layer) for layer in self._cache.layers]
        cache.batch_repeat_interleave(rows)
        return cache


def copied_layer(layer: Any) -> Any:
    """A cache layer that can grow without changing the one it was copied from."""
    # Growing layers make new tensors; others may write into the ones they have.
    grows = type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")
    return copy.copy(layer) if grows else copy.deepcopy(layer)


def grows_plainly(cache: Any) -> bool:
    """Whether all layers keep every key and value in order, so that the last ones can be undone."""
    return all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


def new_cache(lm: CausalModel) -> Any:
    """An empty cache with the layers this model needs (full, sliding, recurrent)."""
    from transformers import DynamicCache

    return DynamicCache(config=lm.model.config)


@torch.no_grad()
def prefix_problem(lm: CausalModel, sequences: Sequence[Sequence[int]]) -> str | None:
    """Why sharing the prefix of these sequences would not be exact; None: it is.

    Compares final hidden states of two sequences with and without a shared prefix.
    """
    prefix = common_prefix(sequences)
    if not prefix:
        return None
    pair = [list(sequences[0]), list(sequences[-1])]
    try:
        with_prefix = _last_hidden(lm, pair, prefix)
    except Exception as error:  # caches of unusual models raise whatever they like
        return f"its cache cannot be expanded ({type(error).__name__})"
    without = _last_hidden(lm, pair, ())
    difference = float((with_prefix - without).norm() / without.norm())
    return None if difference < TOLERANCE else f"hidden states differ by {difference:.1%}"


def _last_hidden(
    lm: CausalModel, sequences: Sequence[Sequence[int]], prefix: Sequence[int]
) -> Tensor:
    kept = PrefixCache(lm, prefix)
    tokens, last = right_padded([s[kept.length :] for s in sequences], lm.device)
    hidden = lm.body(input_ids=tokens, **kept.arguments(lm, len(sequences))).last_hidden_state
    picked: Tensor = hidden[torch.arange(len(sequences)), last.to(hidden.device)].float()
    return picked
