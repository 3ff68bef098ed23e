"""What the unedited model computes at layer boundaries, kept so that candidates need not.

Below the lowest edited layer a candidate is the unedited model: its hidden states there are the
same numbers. Kept within a memory budget at evenly spread boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heretic_kl.model.forward.candidate_hooks import CandidateRows
from heretic_kl.model.forward.layer_inputs import layer_inputs, resumed_at, returns_tuple
from heretic_kl.model.forward.prefix_cache import PrefixCache, copied_layer, layer_bytes

PREFIX = -1
"""Number of the prefix of batch 0; `PREFIX - n` is that of batch n."""


class LayerCache:
    """Hidden states entering the boundaries' layers, batch by batch."""

    def __init__(self, layers: Sequence[nn.Module], boundaries: Sequence[int]) -> None:
        self.boundaries = tuple(sorted(boundaries))
        self.prefixes: dict[int, PrefixCache] = {}
        self._layers = layers
        self._states: dict[tuple[int, int], Tensor] = {}  # (batch, boundary) -> (B, T, D)
        self._caches: dict[int, list[Any]] = {}
        self._as_tuple: list[bool] = []

    @property
    def bytes(self) -> int:
        """Memory that the kept states take."""
        states = sum(state.nbytes for state in self._states.values())
        return states + sum(layer_bytes(layers) for layers in self._caches.values())

    def boundary_for(self, lowest: int) -> int | None:
        """The highest boundary at or below the lowest edited layer; None: run all layers."""
        return max((b for b in self.boundaries if b <= lowest), default=None)

    @contextmanager
    def recording(self, batch: int) -> Iterator[None]:
        """Keep what enters the boundaries while the unedited model runs a batch."""

        def keep(boundary: int, hidden: Tensor) -> None:
            self._states[batch, boundary] = hidden.detach().clone()

        with (
            layer_inputs(self._layers, self.boundaries, keep),
            returns_tuple(self._layers, self._as_tuple),
        ):
            yield

    @contextmanager
    def resuming(self, batch: int, boundary: int, candidates: int) -> Iterator[None]:
        """Have a forward pass of the batch, K times over, start at the boundary."""
        stored = self._states[batch, boundary]
        # A copy also for one candidate: a layer may write into what it is given.
        hidden = stored.repeat(candidates, *[1] * (stored.dim() - 1))
        with resumed_at(self._layers, boundary, hidden, as_tuple=self._as_tuple[0]):
            yield

    def keep_cache(self, batch: int, cache: Any) -> None:
        """Keep what the unedited model's layers hold after a batch; the cache may go on growing."""
        self._caches[batch] = [copied_layer(layer) for layer in cache.layers]

    def fill_cache(self, batch: int, cache: Any, boundary: int, candidates: int, rows: int) -> None:
        """Put it in place of the layers below the boundary, once for each candidate."""
        for index in range(boundary):
            layer = copied_layer(self._caches[batch][index])
            if candidates > 1:
                # Recurrent layers have no keys, and ones that did not run none yet.
                layer.reorder_cache(torch.arange(rows).repeat(candidates))
            cache.layers[index] = layer


@dataclass(frozen=True)
class Start:
    """Where a forward pass begins, and for how many candidates at once."""

    candidate_rows: CandidateRows | None = None
    """Of several candidates, in force by `edited_by_candidate`; None: one candidate."""
    layer_cache: LayerCache | None = None
    """Of the unedited model over the same batches; recorded where `boundary` is None."""
    boundary: int | None = None
    """The first layer to run."""

    @property
    def candidates(self) -> int:
        """K."""
        return 1 if self.candidate_rows is None else len(self.candidate_rows.counts)

    @contextmanager
    def batch(self, index: int, rows: int) -> Iterator[None]:
        """What is in force while one batch of `rows` a candidate runs."""
        if self.candidate_rows is not None:
            self.candidate_rows.counts = [rows] * len(self.candidate_rows.counts)
        if self.layer_cache is None:
            yield
        elif self.boundary is None:
            with self.layer_cache.recording(index):
                yield
        else:
            with self.layer_cache.resuming(index, self.boundary, self.candidates):
                yield

    def complete_prefix(self, prefix: PrefixCache, batch: int = 0) -> None:
        """Give layers of a prefix that did not run the unedited model's keys and values.

        `batch`: whose prefix it is; 0 where all batches have one in common.
        """
        if self.layer_cache is None or not prefix.length:
            return
        if self.boundary is None:
            self.layer_cache.prefixes[batch] = prefix
        else:
            prefix.take_layers(self.layer_cache.prefixes[batch], self.boundary)

    def complete_cache(self, index: int, cache: Any, rows: int) -> None:
        """Do the same for the cache of one batch that goes on growing, or keep it as recorded."""
        if self.layer_cache is None:
            return
        if self.boundary is None:
            self.layer_cache.keep_cache(index, cache)
        else:
            self.layer_cache.fill_cache(index, cache, self.boundary, self.candidates, rows)


WHOLE = Start()
"""One candidate, all layers."""


def spread_boundaries(layers: int, bytes_each: int, budget: int) -> tuple[int, ...]:
    """As many layers as the budget (bytes) allows to keep the inputs of, evenly spread, not 0."""
    count = min(layers - 1, budget // max(1, bytes_each))
    if count < 1:
        return ()
    return tuple(sorted({round(index * layers / (count + 1)) for index in range(1, count + 1)}))
