"""Greedy responses of candidates to one set of prompts, as little of each computed as needed.

While prompts are read, layers below the lowest edited one are not run again. Knows no scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from heretic_kl.ablation import Plan
from heretic_kl.engine.cache_recorder import LayerCacheRecorder, in_force
from heretic_kl.engine.generation.generate import Response, generate_responses
from heretic_kl.engine.generation.groups import ResponseGroup
from heretic_kl.engine.length_buckets import length_buckets
from heretic_kl.engine.memory_limits import MemoryLimits
from heretic_kl.engine.runner import Hear
from heretic_kl.model import Decoding, LanguageModel, PrefixCache, Start, common_prefix, layer_bytes


class CandidateResponses:
    """Responses of candidates to one group of prompts; its batches and layer cache are kept."""

    def __init__(
        self,
        lm: LanguageModel,
        limits: MemoryLimits,
        group: ResponseGroup,
        encoded: Sequence[Sequence[int]],
    ) -> None:
        self._lm = lm
        self._limits = limits
        self._group = group
        self._encoded = encoded
        self._layout: _Layout | None = None
        self._recorder = LayerCacheRecorder(
            lm,
            limits,
            problem=lm.capabilities.cached_resume_problem,
            consequence="all layers read the prompts of every response",
        )

    def responses(
        self, plans: Sequence[Plan | None], hear: Hear | None = None
    ) -> list[list[Response]]:
        """Each candidate's responses to the prompts, in order.

        Args:
            plans: K candidates, side by side in one batch.
            hear: told of all responses so far, by candidate, whenever one more is over; says
                which candidates need not go on, whose responses then stay unfinished.
        """
        layout = self._laid_out()
        start = self._recorder.start(plans, layout)
        responses = [[Response() for _ in self._encoded] for _ in plans]
        dropped: set[int] = set()

        def heard() -> set[int]:
            if hear is not None:
                dropped.update(hear(responses))
            return dropped

        with in_force(self._lm.architecture, plans, start.candidate_rows):
            for number, bucket in enumerate(layout.buckets):
                generate_responses(
                    self._lm,
                    layout.sequences[number],
                    self._group.max_tokens,
                    self._group.rules,
                    start=start,
                    batch=number,
                    into=[of_candidate[index] for of_candidate in responses for index in bucket],
                    dropped=None if hear is None else heard,
                )
        return responses

    def _laid_out(self) -> _Layout:
        rows = self._limits.batch_size
        if self._layout is None or self._layout.max_rows != rows:
            self._layout = _Layout(self._lm, self._encoded, rows, self._group.max_tokens)
        return self._layout


class _Layout:
    """Prompts in batches, as a `heretic_kl.engine.cache_recorder.RepeatedPass`."""

    def __init__(
        self, lm: LanguageModel, encoded: Sequence[Sequence[int]], max_rows: int, most: int
    ) -> None:
        self._lm = lm
        self._most = most
        self.max_rows = max_rows
        # Decoding costs a step of the whole model per token: full batches matter more than
        # a few padded positions.
        self.buckets = length_buckets([len(ids) for ids in encoded], max_rows, max_padding=1.0)
        self.sequences = [[encoded[index] for index in bucket] for bucket in self.buckets]

    @property
    def fed_tokens(self) -> int:
        """Positions computed, padding included, a shared prefix once."""
        fed = 0
        for sequences in self.sequences:
            shared = self._lm.capabilities.shares_prefix_in_cache(sequences, self._most)
            prefix = len(common_prefix(sequences)) if shared else 0
            fed += prefix + len(sequences) * (max(map(len, sequences)) - prefix)
        return fed

    @property
    def cached_bytes(self) -> int:
        """Of one position's keys and values, measured, times all positions."""
        with torch.no_grad():
            cache = PrefixCache(self._lm, self.sequences[0][0][:1]).expanded(self._lm, 1)
        return layer_bytes(cache.layers) * sum(
            len(batch) * max(map(len, batch)) for batch in self.sequences
        )

    @torch.no_grad()
    def run(self, start: Start) -> None:
        """Read all prompts."""
        for number, sequences in enumerate(self.sequences):
            Decoding(self._lm, sequences, self._most, start, number)
