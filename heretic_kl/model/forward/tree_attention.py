"""Attention over a tree of tokens: each sees those on its way to the root. Knows no prompts.

All else that a decoder computes, it computes for each token alone; so a whole tree runs as one
sequence, with positions of its own and this in place of the model's attention function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heretic_kl.errors import UnsupportedModelError
from heretic_kl.model.causal_model import CausalModel

NAME = "heretic_kl_token_tree"
"""Of the attention function, among those of transformers."""
MAX_SCORES = 2**25
"""Scores that are held at once at most, all heads together; with more the fused kernel runs."""
WITHOUT_EFFECT = ("position_ids",)
"""Tensors that attention functions are told and need not know here."""


class TreeRectangle(NamedTuple):
    """Some queries and the keys they may see; nodes are places in the tree, padding any of them."""

    queries: Tensor  # (B, T) int64, nodes
    keys: Tensor  # (B, S) int64, nodes
    seen: Tensor  # (B, T) int64, how many of its row's keys each query sees, at least one
    lengths: Tensor  # (B,) int64, queries of each row that are no padding


class TreeAttention:
    """Who attends to whom in a tree of M nodes, each a query in one of the rectangles once."""

    def __init__(self, rectangles: Sequence[TreeRectangle], nodes: int) -> None:
        self.rectangles = tuple(rectangles)
        self.nodes = nodes
        self.calls = 0
        self._gathers: dict[tuple[int, int, int, torch.device], _Gather] = {}

    def gather(self, candidates: int, heads: int, groups: int, device: torch.device) -> _Gather:
        """Where rows of queries, keys and outputs come from; made once for each kind of layer."""
        key = (candidates, heads, groups, device)
        if key not in self._gathers:
            self._gathers[key] = _Gather(self, *key)
        return self._gathers[key]


class _Piece(NamedTuple):
    """A rectangle, of all candidates and heads: K * B * G products of (H / G * T, S)."""

    queries: Tensor  # (K * B * H * T,) int64, rows among (K * H * M)
    keys: Tensor  # (K * B * G * S,) int64, rows among (K * G * M)
    seen: Tensor  # (B, 1, 1, T, 1) int64
    shape: tuple[int, int, int, int, int, int]  # K, B, G, H / G, T, S

    def unseen(self) -> Tensor:
        """Keys that a query does not see, (B, 1, 1, T, S) bool; made anew, as it can be large."""
        return torch.arange(self.shape[-1], device=self.seen.device) >= self.seen


class _Gather:
    """Indices for tensors of K candidates, H heads, G of them with keys and values of their own."""

    def __init__(
        self, layout: TreeAttention, candidates: int, heads: int, groups: int, device: torch.device
    ) -> None:
        group_heads, nodes = heads // groups, layout.nodes
        self.pieces: list[_Piece] = []
        node_rows = torch.zeros(candidates, nodes, heads, dtype=torch.int64)
        start = 0
        k = torch.arange(candidates)
        for queries, keys, seen, lengths in layout.rectangles:
            rows, length = queries.shape
            width = keys.shape[1]
            slot = k.view(-1, 1, 1, 1, 1)
            group = torch.arange(groups).view(1, 1, -1, 1, 1)
            head = group * group_heads + torch.arange(group_heads).view(1, 1, 1, -1, 1)
            node = queries.view(1, rows, 1, 1, length)
            from_rows = (slot * heads + head) * nodes + node  # (K, B, G, H / G, T)
            key_rows = (slot * groups + group) * nodes + keys.view(1, rows, 1, 1, -1)
            self.pieces.append(
                _Piece(
                    from_rows.flatten().to(device),
                    key_rows.flatten().to(device),
                    seen.view(rows, 1, 1, length, 1).to(device),
                    (candidates, rows, groups, group_heads, length, width),
                )
            )
            real = torch.arange(length) < lengths.view(-1, 1)  # (B, T)
            places = start + torch.arange(from_rows.numel()).view(from_rows.shape)
            by_node = places.permute(0, 1, 4, 2, 3)[:, real].flatten(2)  # (K, real, H)
            node_rows[:, queries[real]] = by_node
            start += from_rows.numel()
        self.outputs = node_rows.flatten().to(device)  # (K * M * H,)


_LAYOUT: ContextVar[TreeAttention] = ContextVar("layout")
_AGAIN = RLock()
"""Backward passes have a thread for each device, and layers may share a config."""


@contextmanager
def attending(model: nn.Module, layout: TreeAttention) -> Iterator[None]:
    """Have a model, or one of its layers, attend as the layout says until the block is left.

    What runs inside must be token ids (K, M), or states of them, with `position_ids` (K, M) and no
    cache. `layout.calls` counts how often a layer has attended.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, tree_attention)
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    token = _LAYOUT.set(layout)
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _LAYOUT.reset(token)


def attending_again(
    layer: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What is to surround a layer's forward pass, and what a repetition of it in a backward pass.

    By then `attending` is left, and on a GPU another thread runs, without its context variables. So
    the second has the layer attend by the layout that is in force now, if any; to be entered once.
    """
    layout = _LAYOUT.get(None)
    return nullcontext(), nullcontext() if layout is None else _again(layer, layout)


@contextmanager
def _again(layer: nn.Module, layout: TreeAttention) -> Iterator[None]:
    with _AGAIN, attending(layer, layout):
        yield


def _configs(model: nn.Module) -> list[Any]:
    """All that name an attention function, the outer ones first: setting one sets its parts."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def tree_attention(
    module: nn.Module,
    query: Tensor,  # (K, H, M, D)
    key: Tensor,  # (K, G, M, D)
    value: Tensor,  # (K, G, M, E)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # (H,) logits of a sink that no token stands for
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; gives (K, M, H, E).

    Raises:
        UnsupportedModelError: the layer asks for something that is not known here.
    """
    layout = _LAYOUT.get()
    layout.calls += 1
    arguments = {**kwargs, "attention_mask": attention_mask}
    unknown = [name for name, argument in arguments.items() if isinstance(argument, Tensor)]
    unknown = [name for name in unknown if name not in WITHOUT_EFFECT]
    if unknown:
        raise UnsupportedModelError(f"its attention takes {', '.join(unknown)}")
    candidates, heads, _, width = query.shape
    groups = key.shape[1]
    gather = layout.gather(candidates, heads, groups, query.device)
    scaling = width**-0.5 if scaling is None else scaling
    queries, keys, values = (t.reshape(-1, t.shape[-1]) for t in (query, key, value))
    outputs = []
    for piece in gather.pieces:
        candidate_rows, rows, _, group_heads, length, places = piece.shape
        q = queries.index_select(0, piece.queries).view(-1, group_heads * length, width)
        k = keys.index_select(0, piece.keys).view(-1, places, width)
        v = values.index_select(0, piece.keys).view(-1, places, value.shape[-1])
        if softcap is None and s_aux is None and _fused(piece, query.device):
            # Heads of a group as queries side by side: no copies of keys and values for each.
            mask = (~piece.unseen()).expand(candidate_rows, rows, 1, group_heads, length, places)
            q, k, v = (t.view(-1, groups, *t.shape[1:]) for t in (q, k, v))
            mask = mask.reshape(-1, 1, group_heads * length, places)
            fused = nn.functional.scaled_dot_product_attention
            attended = fused(q, k, v, attn_mask=mask, scale=scaling)
        else:
            attended = _explicit(q, k, v, piece, scaling, softcap, s_aux)
        outputs.append(attended.reshape(-1, value.shape[-1]))
    output = torch.cat(outputs).index_select(0, gather.outputs)
    return output.view(candidates, layout.nodes, heads, -1), None


def _fused(piece: _Piece, device: torch.device) -> bool:
    """Whether torch's own kernel is the better one; on a CPU it is slow on short rows."""
    return device.type != "cpu" or math.prod(piece.shape) > MAX_SCORES


def _explicit(
    q: Tensor,  # (K * B * G, H / G * T, D)
    k: Tensor,  # (K * B * G, S, D)
    v: Tensor,  # (K * B * G, S, E)
    piece: _Piece,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,  # (H,)
) -> Tensor:
    """Scores and their softmax in float32, probabilities and values in the model's dtype."""
    nothing = torch.zeros((), device=q.device)
    scores = torch.baddbmm(nothing, q.float(), k.float().mT, beta=0, alpha=scaling)
    scores = scores.view(piece.shape)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores.masked_fill_(piece.unseen(), float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        _, _, groups, group_heads, _, _ = piece.shape
        column = sinks.float().view(groups, group_heads, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.bmm(weights.to(v.dtype).reshape(*q.shape[:2], -1), v)


def run_tree(
    lm: CausalModel,
    tokens: Tensor,  # (K, M) int64, on the model's device
    positions: Tensor,  # (M,) int64
    attention: TreeAttention,
) -> Tensor:
    """Final hidden states of a tree's tokens, (K, M, D)."""
    at = positions.to(tokens.device).expand_as(tokens)
    with attending(lm.model, attention):
        output = lm.body(input_ids=tokens, position_ids=at, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
