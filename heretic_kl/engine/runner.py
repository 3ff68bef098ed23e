"""Runs one model over token ids in batches that fit in memory. Knows no prompts and no edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from heretic_kl.engine.generation.generate import ChosenTokens, Response, generate_responses
from heretic_kl.engine.length_buckets import length_buckets
from heretic_kl.engine.memory_limits import MemoryLimits
from heretic_kl.engine.teacher_forcing.batches import ForcedBatches, ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import ForcedPortion, forced_portions, gathered
from heretic_kl.model import CausalModel
from heretic_kl.requests import Sampling, StopRule

TREE_TOKENS = 128
"""Of a tree, for each sequence of a full batch."""
CPU_TREE_TOKENS = 2048
"""Enough for a CPU: with more, what lies between two matrix products leaves its caches."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told of what, how many sequences are done, of how many."""

Hear: TypeAlias = Callable[[Sequence[Sequence[Response]]], Sequence[int]]
"""(each candidate's responses so far) -> candidates that need not go on."""


class Runner:
    """A model, and how much of it runs at once.

    Args:
        lm: the model; what it allows decides how it runs.
        limits: how much runs at once.
        trees: run teacher-forced sequences as trees of tokens where the model allows it.
        progress: told of responses and teacher-forced sequences, batch by batch.
    """

    def __init__(
        self,
        lm: CausalModel,
        limits: MemoryLimits,
        *,
        trees: bool = True,
        progress: Progress = lambda part, done, total: None,
    ) -> None:
        self.lm = lm
        self.limits = limits
        self.progress = progress
        self._trees = trees

    @torch.no_grad()
    def hidden_states(self, sequences: Sequence[ForcedSequence], part: str = "reference") -> Tensor:
        """Final hidden states at all scored positions, (rows, D); see `run_forced`."""
        return self.limits.run(lambda: gathered(self.portions(sequences, part))[0])

    def portions(self, sequences: Sequence[ForcedSequence], part: str) -> Iterator[ForcedPortion]:
        """The same portion by portion; `progress` is told of each as `part`."""
        first_rows = torch.tensor([0, *accumulate(len(s.response) for s in sequences[:-1])])
        done = 0
        self.progress(part, done, len(sequences))
        for portion in forced_portions(self.lm, self.laid_out(sequences)):
            yield portion
            done += int(torch.isin(first_rows, portion.rows).sum())
            self.progress(part, done, len(sequences))

    def laid_out(
        self, sequences: Sequence[ForcedSequence], *, share_prefix: bool = True
    ) -> ForcedBatches:
        """The batches in which the reference and all candidates run, by the present batch size.

        `share_prefix`: where they are no trees, keep what all prompts begin with in a cache.
        """
        longest = max(len(sequence.fed) for sequence in sequences)
        allowed, batch_size = self.lm.capabilities, self.limits.batch_size
        tree_tokens = None
        if self._trees and allowed.runs_trees(longest):
            tree_tokens = batch_size * TREE_TOKENS
            if self.lm.device.type == "cpu":
                tree_tokens = min(tree_tokens, CPU_TREE_TOKENS)
        return ForcedBatches(
            sequences,
            batch_size,
            share_prefix=share_prefix and allowed.shares_prefix(longest),
            tree_tokens=tree_tokens,
        )

    def responses(
        self,
        encoded: Sequence[Sequence[int]],
        max_tokens: int,
        rules: Sequence[StopRule] = (),
        sampling: Sampling | None = None,
    ) -> list[Response]:
        """A response to each sequence, in order; greedy, or drawn if `sampling` says how."""
        return self.limits.run(lambda: self._responses(encoded, max_tokens, rules, sampling))

    def _responses(
        self,
        encoded: Sequence[Sequence[int]],
        max_tokens: int,
        rules: Sequence[StopRule],
        sampling: Sampling | None,
    ) -> list[Response]:
        responses = [Response() for _ in encoded]
        # Decoding costs a step of the whole model per token: full batches matter more than
        # a few padded positions.
        lengths = [len(ids) for ids in encoded]
        buckets = length_buckets(lengths, self.limits.batch_size, max_padding=1.0)
        done = 0
        self.progress("responses", done, len(encoded))
        for bucket in buckets:
            batch = [encoded[index] for index in bucket]
            generate_responses(
                self.lm,
                batch,
                max_tokens,
                rules,
                chosen=ChosenTokens(batch, sampling),
                into=[responses[index] for index in bucket],
            )
            done += len(bucket)
            self.progress("responses", done, len(encoded))
        return responses
