"""A trunk that is recorded when first needed, checked, and left with a reason if not exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from heretic_kl.ablation import Plan, lowest_edited_layer
from heretic_kl.engine.layer_cache import LayerCache, Start, spread_boundaries
from heretic_kl.model import Architecture, CandidateRows, edited, edited_by_candidate

TOLERANCE = 5e-3
"""Largest relative difference of a replayed row; the same kernels in the same batches give 0."""


class Replayed(Protocol):
    """What is run for every candidate: sequences laid out in batches."""

    @property
    def max_rows(self) -> int:
        """Most sequences in a batch; another layout is another trunk."""
        ...

    @property
    def fed_tokens(self) -> int:
        """Positions computed, padding included."""
        ...

    @property
    def cached_bytes(self) -> int:
        """What keys and values take that are kept beside hidden states."""
        ...

    def run(self, start: Start) -> Tensor:
        """(rows, anything): what must not change when layers are replayed."""
        ...


class Replay:
    """The trunk of one layout.

    Args:
        architecture: of the model.
        itemsize: bytes of a number of its hidden states.
        left: tells how much memory is left for the trunk; 0: every pass runs all layers.
        notify: told, in words, why the trunk is not used.
        consequence: what that means: `lower layers run for every candidate`.
    """

    def __init__(
        self,
        architecture: Architecture,
        itemsize: int,
        *,
        left: Callable[[], int],
        notify: Callable[[str], None],
        consequence: str,
    ) -> None:
        self._architecture = architecture
        self._itemsize = itemsize
        self._left = left
        self._notify = notify
        self._consequence = consequence
        self._layer_cache: LayerCache | None = None
        self._rows = 0

    @property
    def bytes(self) -> int:
        """Memory that the trunk takes now."""
        return 0 if self._layer_cache is None else self._layer_cache.bytes

    def release(self) -> None:
        """Give the memory back; what is needed is recorded anew."""
        self._layer_cache, self._rows = None, 0

    def start(self, plans: Sequence[Plan | None], layout: Replayed) -> Start:
        """Where a pass of these candidates over the layout begins; call it before they are edited.

        Args:
            plans: K candidates; None: the unedited model.
            layout: what they run.
        """
        lowest = [lowest_edited_layer(plan or {}) for plan in plans]
        candidate_rows = CandidateRows([1] * len(plans)) if len(plans) > 1 else None
        if None not in lowest:
            layer_cache = self._recorded(layout)
            if layer_cache is not None:
                edited_from = min(layer for layer in lowest if layer is not None)
                boundary = layer_cache.boundary_for(edited_from)
                if boundary is not None:
                    return Start(candidate_rows, layer_cache, boundary)
        return Start(candidate_rows)

    def _recorded(self, layout: Replayed) -> LayerCache | None:
        if self._rows == layout.max_rows:
            return self._layer_cache
        self._rows, self._layer_cache = layout.max_rows, None  # the old one makes room
        budget = self._left()
        if budget <= 0:
            return None
        try:
            self._layer_cache = self._record(layout, budget)
        except torch.OutOfMemoryError:
            self._notify(f"{self._consequence}: memory ran out for their states")
        if self._layer_cache is None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._layer_cache

    def _record(self, layout: Replayed, budget: int) -> LayerCache | None:
        layers = self._architecture.layers
        each = layout.fed_tokens * self._architecture.width * self._itemsize
        boundaries = spread_boundaries(len(layers), each, budget - layout.cached_bytes)
        if not boundaries:
            needed = (each + layout.cached_bytes) / 2**20
            self._notify(
                f"{self._consequence}: their states take at least {needed:.0f} MB, more than is "
                "left of cache_memory_mb"
            )
            return None
        layer_cache = LayerCache(layers, boundaries)
        problem = _problem(layout, layer_cache)
        if problem is not None:
            self._notify(f"{self._consequence}: {problem}")
            return None
        return layer_cache


def _problem(layout: Replayed, layer_cache: LayerCache) -> str | None:
    """Record the trunk; why replaying it would not be exact, or None: it is."""
    boundaries = layer_cache.boundaries
    try:
        whole = layout.run(Start(layer_cache=layer_cache)).float()
        worst = 0.0
        # The highest one too: its layers may need what skipped ones would have left.
        for boundary in {boundaries[len(boundaries) // 2], boundaries[-1]}:
            replayed = layout.run(Start(layer_cache=layer_cache, boundary=boundary)).float()
            rows = (replayed - whole).norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-30)
            worst = max(worst, float(rows.max()))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # models raise whatever they like
        return f"this model cannot start at a layer ({type(error).__name__})"
    return None if worst < TOLERANCE else f"replayed states differ by up to {worst:.1%}"


def in_force(
    architecture: Architecture, plans: Sequence[Plan | None], candidate_rows: CandidateRows | None
) -> AbstractContextManager[None]:
    """The plans' operators: of one candidate on all rows, of several each on its lane."""
    if candidate_rows is not None:
        return edited_by_candidate(architecture, [plan or {} for plan in plans], candidate_rows)
    (plan,) = plans
    return edited(architecture, plan) if plan else nullcontext()
