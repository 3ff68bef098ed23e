"""Residual streams at the last prompt token, layer by layer. Knows nothing about directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from heretic_kl.model.forward.hooks import on_layer_outputs
from heretic_kl.model.forward.padding import right_padded
from heretic_kl.model.forward.prefix_cache import PrefixCache
from heretic_kl.model.language_model import LanguageModel


@torch.no_grad()
def last_token_residuals(
    lm: LanguageModel,
    batches: Iterable[Sequence[Sequence[int]]],
    prefix: Sequence[int] = (),
) -> Iterator[Tensor]:
    """The residual stream after each layer at the last token of every sequence.

    Args:
        lm: the model, unedited.
        batches: batches of token id sequences, padded on the right here; under causal attention
            what follows a token cannot change it.
        prefix: tokens that all sequences begin with, run once; see `common_prefix`.

    Yields:
        (B, L, D) float32 on the CPU, one a batch. A layer that the stream passes several times
        counts as it last was, one that it does not pass (such as those that look at images) as
        the layer below.
    """
    prefix_cache = PrefixCache(lm, prefix)
    for batch in batches:
        tokens, last = right_padded([s[prefix_cache.length :] for s in batch], lm.device)
        rows = torch.arange(len(batch))
        columns: dict[int, Tensor] = {}

        def keep(
            layer: int,
            hidden: Tensor,
            rows: Tensor = rows,
            last: Tensor = last,
            columns: dict[int, Tensor] = columns,
        ) -> None:
            stream = lm.architecture.stream(hidden)
            index = rows.to(stream.device), last.to(stream.device)
            columns[layer] = stream[index].float().cpu()

        with on_layer_outputs(lm.architecture.layers, keep):
            lm.body(input_ids=tokens, **prefix_cache.arguments(lm, len(batch)))
        first = columns[min(columns)]
        for layer in range(len(lm.architecture.layers)):
            columns.setdefault(layer, columns.get(layer - 1, first))
        yield torch.stack([columns[layer] for layer in sorted(columns)], dim=1)
