"""Teacher-forced passes of candidates over fixed sequences, as little of each as needed.

Owns the batches and the trunk. Knows nothing about what rows are reduced to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from heretic_kl.ablation import Plan
from heretic_kl.engine.layer_cache import Start
from heretic_kl.engine.layer_replay import Replay, in_force
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.teacher_forcing.batches import ForcedBatches, ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import (
    ForcedPortion,
    forced_portions,
    gathered,
    run_forced,
)
from heretic_kl.model import Architecture, CausalModel

P = TypeVar("P")


class CandidatePasses:
    """Runs candidates over prompts with the unedited model's answers.

    Args:
        runner: of the model.
        architecture: of the model.
        sequences: what is fed.
        trunk_bytes: tells how much memory is left for the trunk; 0: every pass runs all layers.
        notify: told, in words, why the trunk is not used.
    """

    def __init__(
        self,
        runner: Runner,
        architecture: Architecture,
        sequences: Sequence[ForcedSequence],
        *,
        cache_bytes: Callable[[], int],
        notify: Callable[[str], None],
    ) -> None:
        self._runner = runner
        self._architecture = architecture
        self._sequences = sequences
        self._layout: _Layout | None = None
        self._replay = Replay(
            architecture,
            runner.lm.dtype.itemsize,
            left=cache_bytes,
            notify=notify,
            consequence="lower layers run for every candidate",
        )

    @property
    def cache_bytes(self) -> int:
        """Memory that the trunk takes now."""
        return self._replay.bytes

    def release(self) -> None:
        """Give the trunk's memory back; it is recorded anew when it is needed."""
        self._replay.release()

    def hidden_states(self, plans: Sequence[Plan | None]) -> Tensor:
        """Final hidden states of each candidate, side by side as far as that is worth it.

        Args:
            plans: K candidates; None: the unedited model.

        Returns:
            (K, rows, D), rows ordered as the sequences' answers.
        """
        found: dict[int, Tensor] = {}
        for first, group in self.grouped(plans):

            def keep(portions: Iterator[ForcedPortion], first: int = first) -> None:
                found[first] = gathered(portions)

            self.run(group, keep)
        return torch.cat(list(found.values()))

    def grouped(self, plans: Sequence[P]) -> Iterator[tuple[int, Sequence[P]]]:
        """Candidates in groups worth running side by side, each with the place of its first."""
        first = 0
        while first < len(plans):
            # Anew each time: memory may run out, and batches are others then.
            size = self._laid_out().batches.candidates_at_once(len(plans))
            yield first, plans[first : first + size]
            first += size

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
            layout = self._laid_out()
            start = self._replay.start(plans, layout)
            with in_force(self._architecture, plans, start.candidate_rows):
                consume(forced_portions(self._runner.lm, layout.batches, start))

        self._runner.within_memory(work, candidates=len(plans))

    def _laid_out(self) -> _Layout:
        size = self._runner.batch_size
        if self._layout is None or self._layout.max_rows != size:
            self._layout = _Layout(self._runner.lm, self._runner.laid_out(self._sequences))
        return self._layout


class _Layout:
    """Forced batches as something to replay; see `heretic_kl.engine.layer_replay.Replayed`."""

    cached_bytes = 0

    def __init__(self, lm: CausalModel, batches: ForcedBatches) -> None:
        self._lm = lm
        self.batches = batches
        self.max_rows = batches.max_rows
        self.fed_tokens = batches.fed_tokens

    def run(self, start: Start) -> Tensor:
        return run_forced(self._lm, self.batches, start)[0]
