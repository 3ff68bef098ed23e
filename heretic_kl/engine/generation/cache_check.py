"""What of a model's cache can be used while answers grow. Tries it out on a few tokens.

Caches of unusual models forget what a shared prefix left in them, count padding as tokens, or
cannot drop a row. What a few tokens show to be inexact is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from heretic_kl.engine.generation.decoding import Continuing, Decoding
from heretic_kl.model import CausalModel, inexact, probe_tokens, shortest_window

PREFIX, LENGTHS, FED = 9, (17, 12, 14), 4
"""Of the sequences that are tried: common tokens, tokens of each, tokens that follow."""

_known: WeakKeyDictionary[Any, Continuing] = WeakKeyDictionary()


def continuing(lm: CausalModel) -> Continuing:
    """What of a model's cache is exact; found out once a model, which must not be edited then."""
    if lm.model not in _known:
        _known[lm.model] = _found(lm)
    return _known[lm.model]


@torch.no_grad()
def _found(lm: CausalModel) -> Continuing:
    sequences, fed = sample_sequences(lm)
    whole = _logits_without(lm, sequences, fed)

    def problem(share_prefix: bool) -> str | None:
        way = Continuing(cached=True, gaps=share_prefix)
        try:
            state = Decoding(lm, sequences, way=way, most=FED, share_prefix=share_prefix)
            return inexact(_logits_with(state, fed), whole, lm.dtype)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # caches of unusual models raise whatever they like
            return f"its cache cannot be used ({type(error).__name__})"

    found = problem(False)
    if found is not None:
        why = f"every token of an answer is a pass over all before it: {found}"
        return Continuing(cached=False, gaps=False, problem=why)
    return Continuing(cached=True, gaps=problem(True) is None, window=shortest_window(lm))


def sample_sequences(lm: CausalModel) -> tuple[list[list[int]], list[list[int]]]:
    """Three sequences that begin alike, and what is fed to each of them afterwards."""
    ids = torch.cat([probe_tokens(lm.model, seed).flatten() for seed in range(3)]).tolist()
    prefix, size = ids[:PREFIX], max(LENGTHS) - PREFIX + FED
    parts = [ids[PREFIX + row * size :][:size] for row in range(len(LENGTHS))]
    pairs = zip(LENGTHS, parts, strict=True)
    return [[*prefix, *part[: n - PREFIX]] for n, part in pairs], [part[-FED:] for part in parts]


def _logits_with(state: Decoding, fed: Sequence[Sequence[int]]) -> Tensor:
    """(rows, V) of all steps, one below the other; the first row leaves halfway."""
    rows, found = [0, 1, 2], [state.logits]
    for step in range(FED):
        if step == FED // 2:
            rows = [2, 1]
            state.keep(rows)
        state.advance([fed[row][step] for row in rows])
        found.append(state.logits)
    return torch.cat(found)


def _logits_without(
    lm: CausalModel, sequences: Sequence[Sequence[int]], fed: Sequence[Sequence[int]]
) -> Tensor:
    """The same, each row and step by a pass of its own."""
    found = []
    for step in range(FED + 1):
        for row in [0, 1, 2] if step <= FED // 2 else [2, 1]:
            ids = torch.tensor([[*sequences[row], *fed[row][:step]]], device=lm.device)
            hidden = lm.body(input_ids=ids, use_cache=False).last_hidden_state
            found.append(lm.head.logits(hidden[0, -1:]))
    return torch.cat(found)
