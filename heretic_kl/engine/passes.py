"""Teacher-forced passes of candidates over one reference's answers, as little of each as needed.

Owns the batches and the trunk of one reference. Knows nothing about what rows are reduced to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from heretic_kl.ablation import Plan, lowest_edited_layer
from heretic_kl.engine.forced_reference import forced_sequences
from heretic_kl.engine.forcing import (
    ForcedBatches,
    ForcedPortion,
    Start,
    forced_portions,
    gathered,
    run_forced,
)
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.trunk import Trunk, spread_boundaries
from heretic_kl.kl import Reference
from heretic_kl.model import Architecture, Lanes, edited, edited_by_lane

TOLERANCE = 5e-3
"""Largest relative difference of a replayed row; the same kernels in the same batches give 0."""


class CandidatePasses:
    """Runs candidates over the answers of one reference.

    Args:
        runner: of the model.
        architecture: of the model.
        reference: what is fed, and what the unedited model computed over it.
        trunk_bytes: tells how much memory is left for the trunk; 0: every pass runs all layers.
        notify: told, in words, why the trunk is not used.
    """

    def __init__(
        self,
        runner: Runner,
        architecture: Architecture,
        reference: Reference,
        *,
        trunk_bytes: Callable[[], int],
        notify: Callable[[str], None],
    ) -> None:
        self._runner = runner
        self._architecture = architecture
        self._sequences = forced_sequences(reference)
        self._trunk_bytes_left = trunk_bytes
        self._notify = notify
        self._batches: ForcedBatches | None = None
        self._trunk: Trunk | None = None
        self._trunk_rows = 0

    @property
    def trunk_bytes(self) -> int:
        """Memory that the trunk takes now."""
        return 0 if self._trunk is None else self._trunk.bytes

    def hidden_states(self, plans: Sequence[Plan | None]) -> Tensor:
        """Final hidden states of each candidate, side by side in one batch.

        Args:
            plans: K candidates; None: the unedited model.

        Returns:
            (K, rows, D), rows ordered as in the reference.
        """
        found: list[Tensor] = []

        def keep(portions: Iterator[ForcedPortion]) -> None:
            found[:] = [gathered(portions)]

        self.run(plans, keep)
        return found[0]

    def run(
        self,
        plans: Sequence[Plan | None],
        consume: Callable[[Iterator[ForcedPortion]], None],
    ) -> None:
        """Run candidates side by side; what is not consumed is not computed.

        Args:
            plans: K candidates; None: the unedited model.
            consume: given the portions of the pass, and again from the first one where memory
                ran out and batches are smaller.
        """

        def work() -> None:
            batches = self._laid_out()
            start = self._start(plans, batches)
            edits = [plan or {} for plan in plans]
            with in_force(self._architecture, edits, start.lanes):
                consume(forced_portions(self._runner.lm, batches, start))

        self._runner.within_memory(work, candidates=len(plans))

    def _start(self, plans: Sequence[Plan | None], batches: ForcedBatches) -> Start:
        lowest = [lowest_edited_layer(plan or {}) for plan in plans]
        boundary = trunk = None
        if None not in lowest:
            trunk = self._recorded(batches)
            if trunk is not None:
                boundary = trunk.boundary_for(min(layer for layer in lowest if layer is not None))
        lanes = Lanes([1] * len(plans)) if len(plans) > 1 else None
        return Start(lanes, trunk if boundary is not None else None, boundary)

    def _laid_out(self) -> ForcedBatches:
        size = self._runner.batch_size
        if self._batches is None or self._batches.max_rows != size:
            share = self._runner.share_prefix
            self._batches = ForcedBatches(self._sequences, size, share_prefix=share)
        return self._batches

    def _recorded(self, batches: ForcedBatches) -> Trunk | None:
        """The trunk of these batches, recorded and checked the first time it is asked for."""
        if self._trunk_rows == batches.max_rows:
            return self._trunk
        self._trunk_rows, self._trunk = batches.max_rows, None  # the old one makes room
        budget = self._trunk_bytes_left()
        if budget <= 0:
            return None
        try:
            self._trunk = self._record(batches, budget)
        except torch.OutOfMemoryError:
            self._notify("lower layers run for every candidate: memory ran out for their states")
        if self._trunk is None and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._trunk

    def _record(self, batches: ForcedBatches, budget: int) -> Trunk | None:
        layers = self._architecture.layers
        each = batches.fed_tokens * self._architecture.width * self._runner.lm.dtype.itemsize
        boundaries = spread_boundaries(len(layers), each, budget)
        if not boundaries:
            self._notify(
                f"lower layers run for every candidate: their states take {each / 2**20:.0f} MB a "
                "layer, more than is left of trunk_memory_mb"
            )
            return None
        trunk = Trunk(layers, boundaries)
        problem = self._problem(batches, trunk)
        if problem is not None:
            self._notify(f"lower layers run for every candidate: {problem}")
            return None
        return trunk

    def _problem(self, batches: ForcedBatches, trunk: Trunk) -> str | None:
        """Record the trunk; why replaying it would not be exact, or None: it is."""
        lm, boundaries = self._runner.lm, trunk.boundaries
        try:
            whole = run_forced(lm, batches, Start(trunk=trunk)).float()
            worst = 0.0
            # The highest one too: its layers may need what skipped ones would have left.
            for boundary in {boundaries[len(boundaries) // 2], boundaries[-1]}:
                replayed = run_forced(lm, batches, Start(trunk=trunk, boundary=boundary)).float()
                rows = (replayed - whole).norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-30)
                worst = max(worst, float(rows.max()))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models raise whatever they like
            return f"this model cannot start at a layer ({type(error).__name__})"
        if worst < TOLERANCE:
            return None
        return f"replayed hidden states differ by up to {worst:.1%}"


def in_force(
    architecture: Architecture, plans: Sequence[Plan], lanes: Lanes | None
) -> AbstractContextManager[None]:
    """The plans' operators: of one candidate on all rows, of several each on its lane."""
    if lanes is not None:
        return edited_by_lane(architecture, plans, lanes)
    (plan,) = plans
    return edited(architecture, plan) if plan else nullcontext()
