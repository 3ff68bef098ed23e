"""Teacher-forced passes of candidates over one reference's answers, as little of each as needed.

Owns the batches and the trunk of one reference. Knows nothing about what rows are reduced to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from heretic_kl.ablation import Plan, lowest_edited_layer
from heretic_kl.engine.forced_reference import forced_sequences
from heretic_kl.engine.forcing import ForcedBatches, Start, run_forced
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.trunk import Trunk, spread_boundaries
from heretic_kl.kl import Reference
from heretic_kl.model import Architecture, Lanes, edited, edited_by_lane

TOLERANCE = 2e-2
"""Largest relative difference of replayed hidden states; 0 in float32, where nothing differs."""


class CandidatePasses:
    """Runs candidates over the answers of one reference.

    Args:
        runner: of the model.
        architecture: of the model.
        reference: what is fed, and what the unedited model computed over it.
        trunk_bytes: memory for the trunk; 0: every pass runs all layers.
        notify: told, in words, why the trunk is not used.
    """

    def __init__(
        self,
        runner: Runner,
        architecture: Architecture,
        reference: Reference,
        *,
        trunk_bytes: int,
        notify: Callable[[str], None],
    ) -> None:
        self._runner = runner
        self._architecture = architecture
        self._sequences = forced_sequences(reference)
        self._trunk_bytes = trunk_bytes
        self._notify = notify
        self._batches: ForcedBatches | None = None
        self._trunk: Trunk | None = None
        self._trunk_rows = 0

    def hidden_states(self, plans: Sequence[Plan | None]) -> Tensor:
        """Final hidden states of each candidate, side by side in one batch.

        Args:
            plans: K candidates; None: the unedited model.

        Returns:
            (K, rows, D), rows ordered as in the reference.
        """
        return self._runner.within_memory(lambda: self._run(plans), candidates=len(plans))

    def _run(self, plans: Sequence[Plan | None]) -> Tensor:
        batches = self._laid_out()
        lowest = [lowest_edited_layer(plan or {}) for plan in plans]
        edits = [plan or {} for plan in plans]
        boundary = trunk = None
        if None not in lowest:
            trunk = self._recorded(batches)
            if trunk is not None:
                boundary = trunk.boundary_for(min(layer for layer in lowest if layer is not None))
        lanes = Lanes([1] * len(plans)) if len(plans) > 1 else None
        start = Start(lanes, trunk if boundary is not None else None, boundary)
        with in_force(self._architecture, edits, lanes):
            return run_forced(self._runner.lm, batches, start)

    def _laid_out(self) -> ForcedBatches:
        size = self._runner.batch_size
        if self._batches is None or self._batches.max_rows != size:
            share = self._runner.share_prefix
            self._batches = ForcedBatches(self._sequences, size, share_prefix=share)
        return self._batches

    def _recorded(self, batches: ForcedBatches) -> Trunk | None:
        """The trunk of these batches, recorded and checked the first time it is asked for."""
        if self._trunk_bytes <= 0:
            return None
        if self._trunk_rows != batches.max_rows:
            self._trunk_rows = batches.max_rows
            self._trunk = self._record(batches)
        return self._trunk

    def _record(self, batches: ForcedBatches) -> Trunk | None:
        layers = self._architecture.layers
        each = batches.fed_tokens * self._architecture.width * self._runner.lm.dtype.itemsize
        boundaries = spread_boundaries(len(layers), each, self._trunk_bytes)
        if not boundaries:
            self._notify(
                f"lower layers run for every candidate: their states take {each / 2**20:.0f} MB a "
                "layer, more than trunk_memory_mb allows"
            )
            return None
        trunk = Trunk(layers, boundaries)
        whole = run_forced(self._runner.lm, batches, Start(trunk=trunk))
        problem = self._problem(batches, trunk, whole)
        if problem is not None:
            self._notify(f"lower layers run for every candidate: {problem}")
            return None
        return trunk

    def _problem(self, batches: ForcedBatches, trunk: Trunk, whole: Tensor) -> str | None:
        """Why replaying the trunk would not be exact; None: it is."""
        boundary = trunk.boundaries[len(trunk.boundaries) // 2]
        try:
            replayed = run_forced(self._runner.lm, batches, Start(trunk=trunk, boundary=boundary))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models raise whatever they like
            return f"this model cannot start at a layer ({type(error).__name__})"
        difference = float((replayed - whole).float().norm() / whole.float().norm())
        if difference < TOLERANCE:
            return None
        return f"replayed hidden states differ by {difference:.1%}"


def in_force(
    architecture: Architecture, plans: Sequence[Plan], lanes: Lanes | None
) -> AbstractContextManager[None]:
    """The plans' operators: of one candidate on all rows, of several each on its lane."""
    if lanes is not None:
        return edited_by_lane(architecture, plans, lanes)
    (plan,) = plans
    return edited(architecture, plan) if plan else nullcontext()
