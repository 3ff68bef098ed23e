"""Records a layer cache when candidates first need it, within the memory left. Knows no prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from heretic_kl.ablation import Plan, lowest_edited_layer
from heretic_kl.engine.memory_limits import MemoryLimits
from heretic_kl.model import (
    Architecture,
    CandidateRows,
    LanguageModel,
    LayerCache,
    Start,
    edited,
    edited_by_candidate,
    spread_boundaries,
)


class RepeatedPass(Protocol):
    """What runs for every candidate: sequences laid out in batches."""

    @property
    def max_rows(self) -> int:
        """Most sequences in a batch; other batches need another layer cache."""
        ...

    @property
    def fed_tokens(self) -> int:
        """Positions computed, padding included."""
        ...

    @property
    def cached_bytes(self) -> int:
        """What keys and values take that are kept beside hidden states."""
        ...

    def run(self, start: Start) -> None:
        """Run all batches once."""
        ...


class LayerCacheRecorder:
    """The layer cache of one repeated pass.

    Args:
        lm: the model, unedited whenever `start` is called.
        limits: how much may be kept.
        problem: why the model cannot start at a layer; None: it can.
        consequence: what it means to have no layer cache: `lower layers run for every candidate`.
    """

    def __init__(
        self, lm: LanguageModel, limits: MemoryLimits, *, problem: str | None, consequence: str
    ) -> None:
        self._lm = lm
        self._limits = limits
        self._problem = problem
        self._consequence = consequence
        self._layer_cache: LayerCache | None = None
        self._rows = 0
        limits.hold(self)

    @property
    def bytes(self) -> int:
        """Memory that the layer cache takes now."""
        return 0 if self._layer_cache is None else self._layer_cache.bytes

    def release(self) -> None:
        """Give the memory back; what is needed is recorded again."""
        self._layer_cache, self._rows = None, 0

    def start(self, plans: Sequence[Plan | None], layout: RepeatedPass) -> Start:
        """Where a pass of these candidates begins; call it before they are in force."""
        lowest = [lowest_edited_layer(plan or {}) for plan in plans]
        candidate_rows = CandidateRows([1] * len(plans)) if len(plans) > 1 else None
        edited_layers = [layer for layer in lowest if layer is not None]
        if len(edited_layers) == len(plans):
            layer_cache = self._recorded(layout)
            boundary = None if layer_cache is None else layer_cache.boundary_for(min(edited_layers))
            if boundary is not None:
                return Start(candidate_rows, layer_cache, boundary)
        return Start(candidate_rows)

    def _recorded(self, layout: RepeatedPass) -> LayerCache | None:
        if self._rows == layout.max_rows or self._problem is not None:
            return self._layer_cache
        self._layer_cache = None  # the old one makes room
        budget = self._limits.cache_left
        if budget > 0:
            self._layer_cache = self._record(layout, budget)
        self._rows = layout.max_rows
        return self._layer_cache

    def _record(self, layout: RepeatedPass, budget: int) -> LayerCache | None:
        architecture = self._lm.architecture
        at_one_boundary = layout.fed_tokens * architecture.width * self._lm.dtype.itemsize
        boundaries = spread_boundaries(
            len(architecture.layers), at_one_boundary, budget - layout.cached_bytes
        )
        if not boundaries:
            needed = (at_one_boundary + layout.cached_bytes) / 2**20
            self._limits.notify(
                f"{self._consequence}: their states take at least {needed:.0f} MB, more than is "
                "left of cache_memory_mb"
            )
            return None
        layer_cache = LayerCache(architecture.layers, boundaries)
        with self._limits.keeping():
            layout.run(Start(layer_cache=layer_cache))
        return layer_cache


def in_force(
    architecture: Architecture, plans: Sequence[Plan | None], candidate_rows: CandidateRows | None
) -> AbstractContextManager[None]:
    """The plans' operators: of one candidate on all rows, of several each on its own rows."""
    if candidate_rows is not None:
        return edited_by_candidate(architecture, [plan or {} for plan in plans], candidate_rows)
    (plan,) = plans
    return edited(architecture, plan) if plan else nullcontext()
