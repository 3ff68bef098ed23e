"""Whether a model can run a tree of tokens. Tries it out on a few."""

from __future__ import annotations

import inspect
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from heretic_kl.engine.generation.cache_check import sample_sequences
from heretic_kl.engine.teacher_forcing.token_tree import TokenTree, tree_rectangles
from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model import (
    CausalModel,
    TreeAttention,
    attending,
    inexact,
    new_cache,
    shortest_window,
)

ATTENDING = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of a cache that keep keys and values, and nothing that one token hands to the next."""

_known: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def tree_problem(lm: CausalModel) -> str | None:
    """Why trees of tokens would not be exact; None: they are.

    Found out once a model, which must not be edited then.
    """
    if lm.model not in _known:
        _known[lm.model] = _found(lm)
    return _known[lm.model]


def run_tree(
    lm: CausalModel, tokens: Tensor, positions: Tensor, attention: TreeAttention
) -> Tensor:
    """Final hidden states of a tree's tokens, (K, M, D).

    Args:
        lm: the model.
        tokens: (K, M) int64, on its device.
        positions: (M,) int64.
        attention: who attends to whom.
    """
    at = positions.to(tokens.device).expand_as(tokens)
    with attending(lm, attention):
        found = lm.body(input_ids=tokens, position_ids=at, use_cache=False)
    hidden: Tensor = found.last_hidden_state
    return hidden


@torch.no_grad()
def _found(lm: CausalModel) -> str | None:
    if "position_ids" not in inspect.signature(lm.model.forward).parameters:
        return "this model cannot be told the positions of tokens"
    kinds = {type(layer).__name__ for layer in new_cache(lm).layers}
    if not kinds <= set(ATTENDING):
        return "some of its layers hand a state from token to token"
    sequences, _fed = sample_sequences(lm)
    window = shortest_window(lm)
    if window is not None and window < max(map(len, sequences)):
        return f"some of its layers see no more than {window} tokens"
    tree = TokenTree(sequences)
    attention = TreeAttention(tree_rectangles(tree), len(tree.tokens))
    try:
        tokens = torch.tensor([tree.tokens], device=lm.device)
        ours = run_tree(lm, tokens, torch.tensor(tree.positions), attention)[0]
        alone = [
            lm.body(input_ids=torch.tensor([s], device=lm.device), use_cache=False)
            for s in sequences
        ]
    except torch.OutOfMemoryError:
        raise
    except UnsupportedModelError as error:
        return str(error)
    except Exception as error:  # models raise whatever they like
        return f"its attention cannot be replaced ({type(error).__name__})"
    layers = lm.model.config.get_text_config().num_hidden_layers
    if attention.calls < layers:
        return f"{attention.calls} of its {layers} layers let their attention be replaced"
    # Of tokens of one sequence alone: the others say little about what must not be mixed.
    shared = sum(len(set(column)) == 1 for column in zip(*tree.paths, strict=False))
    states = [a.last_hidden_state[0, shared:] for a in alone]
    own = [ours[list(path[shared:])] for path in tree.paths]
    return inexact(
        torch.cat(own).flatten(1), torch.cat(states).flatten(1), lm.dtype, "hidden states"
    )
