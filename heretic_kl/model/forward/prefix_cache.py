"""The tokens that all prompts begin with, run once and kept as keys and values.

System prompt and chat template are often more than half of a short prompt. Under a causal model
what they compute does not depend on what follows, so one row serves all. Knows no prompts.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from heretic_kl.model.causal_model import CausalModel

SHORTEST = 8
"""Fewer common tokens are not worth a pass of their own."""
FEWEST_ROWS = 2
CACHE_NAMES = ("cache", "cache_params", "past_key_values")


def common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The leading tokens that all sequences share; each keeps at least one token of its own.

    Empty where it would not pay.
    """
    if len(sequences) < FEWEST_ROWS:
        return ()
    shared = tuple(os.path.commonprefix([tuple(sequence[:-1]) for sequence in sequences]))
    return shared if len(shared) >= SHORTEST else ()


class PrefixCache:
    """Keys and values of one prefix, for batches of any size.

    Computed under the edits that are in force when it is made; valid only for those.
    """

    def __init__(
        self,
        lm: CausalModel,
        tokens: Sequence[int],  # may be empty
        *,
        rows: int = 1,  # K, candidates that each have a prefix of their own
    ) -> None:
        self.length = len(tokens)
        self.rows = rows
        self._cache: Any = None
        if tokens:
            self._cache = new_cache(lm)
            ids = torch.tensor([list(tokens)] * rows, device=lm.device)
            lm.body(input_ids=ids, use_cache=True, **{lm.capabilities.cache_argument: self._cache})

    def take_layers(self, other: PrefixCache, below: int) -> None:
        """Take keys and values of the layers below from another, one-rowed cache."""
        for layer in range(below):
            taken = copied_layer(other._cache.layers[layer])
            _repeat(taken, 1, self.rows)
            self._cache.layers[layer] = taken

    def arguments(self, lm: CausalModel, rows: int) -> dict[str, Any]:
        """What to pass to the model's body for the rest of `rows` sequences a candidate."""
        if self._cache is None:
            return {"use_cache": False}
        return {lm.capabilities.cache_argument: self.expanded(lm, rows), "use_cache": True}

    def expanded(self, lm: CausalModel, rows: int) -> Any:
        """A cache of `rows` rows a candidate that begins with the prefix; it may be changed."""
        if self._cache is None:
            return new_cache(lm)
        cache = copy.copy(self._cache)
        cache.layers = [copied_layer(layer) for layer in self._cache.layers]
        for layer in cache.layers:
            _repeat(layer, self.rows, rows)
        return cache


def copied_layer(layer: Any) -> Any:
    """A cache layer that can grow without changing the one it was copied from."""
    # Growing layers make new tensors; others may write into the ones they have.
    grows = type(layer).__name__ in ("DynamicLayer", "DynamicSlidingWindowLayer")
    if grows:
        return copy.copy(layer)
    # What has gradients can be cloned, not copied deeply.
    clones = {id(tensor): tensor.clone() for tensor in _tensors_in(vars(layer))}
    return copy.deepcopy(layer, clones)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings and sequences."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(part)


def layer_bytes(layers: Iterable[Any]) -> int:
    """Memory that the tensors of a cache's layers take."""
    values = [value for layer in layers for value in vars(layer).values()]
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _repeat(layer: Any, rows: int, times: int) -> None:
    """Each row of a cache layer several times; recurrent layers can only be reordered."""
    if times > 1:
        layer.reorder_cache(torch.arange(rows).repeat_interleave(times))


def find_cache_argument(model: Any) -> str:
    """Under which name a model takes its cache; transformers before 5.24 had two others."""
    arguments = inspect.signature(model.forward).parameters
    fitting = [name for name in CACHE_NAMES if name in arguments]
    return fitting[0] if fitting else CACHE_NAMES[-1]


def has_places(cache: Any) -> bool:
    """Whether some layer keeps tokens apart, so that they can be masked out; a state does not."""
    return any(hasattr(layer, "keys") for layer in cache.layers)


def new_cache(lm: CausalModel) -> Any:
    """An empty cache with the layers this model needs (full, sliding, recurrent)."""
    from transformers import DynamicCache

    return DynamicCache(config=lm.model.config)
