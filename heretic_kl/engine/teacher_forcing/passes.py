"""Teacher-forced passes of candidates over fixed sequences, as little of each as needed.

Owns the batches and the layer cache. Knows nothing about what rows are reduced to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from heretic_kl.ablation import Plan
from heretic_kl.engine.cache_recorder import LayerCacheRecorder, in_force
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.teacher_forcing.batches import ForcedBatches, ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import (
    ForcedPortion,
    forced_portions,
    gathered,
    run_forced,
)
from heretic_kl.model import CausalModel, LanguageModel, Start

P = TypeVar("P")


class CandidatePasses:
    """Runs candidates over prompts with the unedited model's responses."""

    def __init__(
        self, lm: LanguageModel, runner: Runner, sequences: Sequence[ForcedSequence]
    ) -> None:
        self._lm = lm
        self._runner = runner
        self._sequences = sequences
        self._layout: _Layout | None = None
        self._recorder = LayerCacheRecorder(
            lm,
            runner.limits,
            problem=lm.capabilities.resume_problem,
            consequence="lower layers run for every candidate",
        )

    def hidden_states(self, plans: Sequence[Plan | None]) -> Tensor:
        """Final hidden states of each candidate, side by side as far as that is worth it.

        Returns:
            (K, rows, D), rows ordered as the sequences' responses.
        """
        hidden_by_group: dict[int, Tensor] = {}
        for first, group in self.grouped(plans):

            def keep(portions: Iterator[ForcedPortion], first: int = first) -> None:
                hidden_by_group[first] = gathered(portions)

            self.run(group, keep)
        return torch.cat(list(hidden_by_group.values()))

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
        """Run candidates side by side; portions that are not consumed are not computed."""
        layout = self._laid_out()
        start = self._recorder.start(plans, layout)
        with torch.no_grad(), in_force(self._lm.architecture, plans, start.candidate_rows):
            consume(forced_portions(self._lm, layout.batches, start))

    def _laid_out(self) -> _Layout:
        size = self._runner.limits.batch_size
        if self._layout is None or self._layout.max_rows != size:
            self._layout = _Layout(self._lm, self._runner.laid_out(self._sequences))
        return self._layout


class _Layout:
    """Forced batches as a `heretic_kl.engine.cache_recorder.RepeatedPass`."""

    cached_bytes = 0

    def __init__(self, lm: CausalModel, batches: ForcedBatches) -> None:
        self._lm = lm
        self.batches = batches
        self.max_rows = batches.max_rows
        self.fed_tokens = batches.fed_tokens

    def run(self, start: Start) -> None:
        run_forced(self._lm, self.batches, start)
