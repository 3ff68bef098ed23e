"""Greedy answers of candidates to one set of prompts, as little of each computed as needed.

While prompts are read, layers below the lowest edited one are not run again. Knows no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heretic_kl.ablation import Plan
from heretic_kl.engine.batching import length_buckets
from heretic_kl.engine.generation.cache_check import continuing
from heretic_kl.engine.generation.decoding import Decoding
from heretic_kl.engine.generation.generate import Response, generate_responses
from heretic_kl.engine.layer_cache import Start
from heretic_kl.engine.layer_replay import Replay, in_force
from heretic_kl.engine.runner import Hear, Runner
from heretic_kl.model import Architecture, CausalModel, PrefixCache, common_prefix
from heretic_kl.requests import StopRule


class CandidateResponses:
    """Has candidates answer.

    Args:
        runner: of the model.
        architecture: of the model.
        encoded: token ids of the prompts.
        max_tokens: most tokens of an answer.
        rules: see `generate_responses`.
        trunk_bytes: tells how much memory is left for the trunk; 0: all layers read the prompts.
        notify: told, in words, what cannot be saved.
    """

    def __init__(
        self,
        runner: Runner,
        architecture: Architecture,
        encoded: Sequence[Sequence[int]],
        max_tokens: int,
        rules: Sequence[StopRule],
        *,
        cache_bytes: Callable[[], int],
        notify: Callable[[str], None],
    ) -> None:
        self._runner = runner
        self._architecture = architecture
        self._encoded = encoded
        self._max_tokens = max_tokens
        self._rules = rules
        self._layout: _Layout | None = None
        self._replay = Replay(
            architecture,
            runner.lm.dtype.itemsize,
            left=cache_bytes if continuing(runner.lm).cached else lambda: 0,
            notify=notify,
            consequence="all layers read the prompts of every answer",
        )

    @property
    def cache_bytes(self) -> int:
        """Memory that the trunk takes now."""
        return self._replay.bytes

    def release(self) -> None:
        """Give the trunk's memory back; it is recorded anew when it is needed."""
        self._replay.release()

    def responses(
        self, plans: Sequence[Plan | None], hear: Hear | None = None
    ) -> list[list[Response]]:
        """Each candidate's answers to the prompts, in order.

        Args:
            plans: K candidates, side by side in one batch.
            hear: told of all answers so far, by candidate, whenever one more is over; says which
                candidates need not go on, whose answers then stay unfinished.

        Raises:
            OutOfMemoryError: several candidates do not fit side by side.
        """
        return self._runner.within_memory(lambda: self._run(plans, hear), candidates=len(plans))

    def _run(self, plans: Sequence[Plan | None], hear: Hear | None) -> list[list[Response]]:
        layout = self._laid_out()
        start = self._replay.start(plans, layout)
        found = [[Response() for _ in self._encoded] for _ in plans]
        dropped: set[int] = set()

        def heard() -> set[int]:
            if hear is not None:
                dropped.update(hear(found))
            return dropped

        with in_force(self._architecture, plans, start.candidate_rows):
            for number, bucket in enumerate(layout.buckets):
                generate_responses(
                    self._runner.lm,
                    layout.sequences[number],
                    self._max_tokens,
                    self._rules,
                    share_prefix=self._runner.share_prefix,
                    start=start,
                    batch=number,
                    into=[own[index] for own in found for index in bucket],
                    dropped=None if hear is None else heard,
                )
        return found

    def _laid_out(self) -> _Layout:
        if self._layout is None or self._layout.max_rows != self._runner.batch_size:
            self._layout = _Layout(self._runner, self._encoded, self._max_tokens)
        return self._layout


class _Layout:
    """Prompts in batches, as something to replay."""

    def __init__(
        self,
        runner: Runner,
        encoded: Sequence[Sequence[int]],
        most: int,
    ) -> None:
        self._lm: CausalModel = runner.lm
        self._most = most
        self._share_prefix = runner.share_prefix
        self.max_rows = runner.batch_size
        # Decoding costs a step of the whole model per token: full batches matter more than
        # a few padded positions.
        lengths = [len(ids) for ids in encoded]
        self.buckets = length_buckets(lengths, self.max_rows, max_padding=1.0)
        self.sequences = [[encoded[index] for index in bucket] for bucket in self.buckets]
        self.fed_tokens, self._places = self._sizes()

    @property
    def cached_bytes(self) -> int:
        """Of one position's keys and values, measured, times all positions."""
        with torch.no_grad():
            cache = PrefixCache(self._lm, self.sequences[0][0][:1]).expanded(self._lm, 1)
        tensors = [t for layer in cache.layers for t in vars(layer).values()]
        each = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
        return each * self._places

    def run(self, start: Start) -> Tensor:
        """Logits after the prompts, and after one more token: (rows, V)."""
        found = []
        for number, sequences in enumerate(self.sequences):
            state = Decoding(
                self._lm,
                sequences,
                way=continuing(self._lm),
                most=self._most,
                share_prefix=self._share_prefix,
                start=start,
                batch=number,
            )
            found.append(state.logits.cpu())
            state.advance([ids[-1] for ids in sequences])
            found.append(state.logits.cpu())
        return torch.cat(found)

    def _sizes(self) -> tuple[int, int]:
        """Positions computed, and positions in the caches."""
        fed = places = 0
        for sequences in self.sequences:
            prefix = len(common_prefix(sequences)) if self._share_prefix else 0
            width = max(map(len, sequences))
            fed += prefix + len(sequences) * (width - prefix)
            places += len(sequences) * width
        return fed, places
