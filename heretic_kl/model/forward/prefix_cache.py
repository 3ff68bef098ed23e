"""The tokens that all prompts begin with, run once and kept as keys and values.

System prompt and chat template are often more than half of a short prompt. Under a causal model
what they compute does not depend on what follows, so one row serves all. Knows no prompts.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from heretic_kl.model.causal_model import CausalModel
from heretic_kl.model.forward.padding import right_padded

SHORTEST = 8
"""Fewer common tokens are not worth a pass of their own."""
FEWEST_ROWS = 2
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Largest relative difference of what two ways of computing the same give; rounding gives 1e-6,
over a few recurrent layers 1e-4."""
LOW_PRECISION_TOLERANCE = 5e-2
CACHE_NAMES = ("cache", "cache_params", "past_key_values")
WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention")
"""Settings that limit how far some layers see; not every such layer has a cache that says so."""


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
            lm.body(input_ids=ids, use_cache=True, **{cache_argument(lm): self._cache})

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
        return {cache_argument(lm): self.expanded(lm, rows), "use_cache": True}

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
    return copy.copy(layer) if grows else copy.deepcopy(layer)


def _repeat(layer: Any, rows: int, times: int) -> None:
    """Each row of a cache layer several times; recurrent layers can only be reordered."""
    if times > 1:
        layer.reorder_cache(torch.arange(rows).repeat_interleave(times))


def cache_argument(lm: CausalModel) -> str:
    """Under which name the model takes its cache; transformers before 5.24 had two others."""
    known = inspect.signature(lm.model.forward).parameters
    fitting = [name for name in CACHE_NAMES if name in known]
    return fitting[0] if fitting else CACHE_NAMES[-1]


def has_places(cache: Any) -> bool:
    """Whether some layer keeps tokens apart, so that they can be masked out; a state does not."""
    return any(hasattr(layer, "keys") for layer in cache.layers)


def shortest_window(lm: CausalModel) -> int | None:
    """How many places back some layer sees at least; None: all layers see everything."""
    config = lm.model.config.get_text_config().to_dict()
    found = [getattr(layer, "sliding_window", None) for layer in new_cache(lm).layers]
    found += [config.get(name) for name in WINDOWS]
    return min((n for n in found if isinstance(n, int) and n > 1), default=None)


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
    return inexact(with_prefix, without, lm.dtype, "hidden states")


def inexact(
    ours: Tensor,  # (rows, any)
    whole: Tensor,  # (rows, any) the same computed in the plainest way
    dtype: torch.dtype,
    what: str = "logits",
) -> str | None:
    """How far two ways of computing the same are apart, if they are more than rounding apart."""
    rows = (ours.float() - whole.float()).norm(dim=-1) / whole.float().norm(dim=-1)
    rows = rows.nan_to_num(torch.inf)
    # In low precision single tokens may be sent to other experts.
    apart = float(rows.quantile(1.0 if dtype in TOLERANCE else 0.75))
    small = apart < TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
    return None if small else f"{what} differ by {apart:.1%}"


def _last_hidden(
    lm: CausalModel, sequences: Sequence[Sequence[int]], prefix: Sequence[int]
) -> Tensor:
    kept = PrefixCache(lm, prefix)
    tokens, last = right_padded([s[kept.length :] for s in sequences], lm.device)
    hidden = lm.body(input_ids=tokens, **kept.arguments(lm, len(sequences))).last_hidden_state
    picked: Tensor = hidden[torch.arange(len(sequences)), last.to(hidden.device)].float()
    return picked
