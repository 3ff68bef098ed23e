"""Runs one model over token ids in batches that fit in memory. Knows no prompts and no edits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from heretic_kl.engine.batching import length_buckets
from heretic_kl.engine.generation.generate import ChosenTokens, Response, generate_responses
from heretic_kl.engine.teacher_forcing.batches import ForcedBatches, ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import run_forced
from heretic_kl.errors import MeasurementError
from heretic_kl.model import CausalModel, shortest_window
from heretic_kl.requests import Sampling, StopRule

T = TypeVar("T")

TREE_TOKENS = 128
"""Of a tree, for each sequence of a full batch."""
CPU_TREE_TOKENS = 2048
"""Enough for a CPU: with more, what lies between two matrix products leaves its caches."""

Hear: TypeAlias = Callable[[Sequence[Sequence[Response]]], Sequence[int]]
"""(each candidate's answers so far) -> candidates that need not go on."""


class Runner:
    """A model, and how much of it runs at once.

    Args:
        lm: the model.
        batch_size: most sequences in a batch; halved, and remembered, when memory runs out.
        share_prefix: run the tokens that all sequences begin with once; see
            `heretic_kl.model.prefix_problem` for models that do not allow it.
        trees: run sequences that are fed as trees of tokens; see `heretic_kl.engine.tree_problem`
            for models that do not allow it.
        notify: told, in words, when the batch size had to change.
    """

    def __init__(
        self,
        lm: CausalModel,
        batch_size: int,
        *,
        share_prefix: bool = True,
        trees: bool = False,
        notify: Callable[[str], None] = lambda message: None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lm = lm
        self.batch_size = batch_size
        self.share_prefix = share_prefix
        self.trees = trees
        self._notify = notify

    def hidden_states(self, sequences: Sequence[ForcedSequence]) -> Tensor:
        """Final hidden states at all scored positions, (rows, D); see `run_forced`."""
        return self.within_memory(lambda: run_forced(self.lm, self.laid_out(sequences))[0])

    def laid_out(self, sequences: Sequence[ForcedSequence]) -> ForcedBatches:
        """The batches in which the reference and all candidates run, by the present batch size."""
        longest = max(len(sequence.fed) for sequence in sequences)
        tree_tokens = None
        if self.trees and (self._window is None or longest <= self._window):
            tree_tokens = self.batch_size * TREE_TOKENS
            if self.lm.device.type == "cpu":
                tree_tokens = min(tree_tokens, CPU_TREE_TOKENS)
        return ForcedBatches(
            sequences,
            self.batch_size,
            share_prefix=self.share_prefix,
            tree_tokens=tree_tokens,
        )

    @cached_property
    def _window(self) -> int | None:
        """In a tree every token sees all before it."""
        return shortest_window(self.lm)

    def responses(
        self,
        encoded: Sequence[Sequence[int]],
        max_tokens: int,
        rules: Sequence[StopRule] = (),
        sampling: Sampling | None = None,
    ) -> list[Response]:
        """An answer to each sequence, in order; greedy, or drawn if `sampling` says how."""
        return self.within_memory(lambda: self._responses(encoded, max_tokens, rules, sampling))

    def within_memory(self, work: Callable[[], T], *, candidates: int = 1) -> T:
        """Do work; where memory runs out, again in batches of half the size.

        Args:
            work: what to do; reads the batch size anew each time.
            candidates: K. Several are for the caller to part first.

        Raises:
            OutOfMemoryError: it runs out with several candidates.
            MeasurementError: it runs out with single sequences.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if candidates > 1:
                    raise
                if self.batch_size == 1:
                    raise MeasurementError(
                        "out of memory with a single prompt: use shorter prompts, fewer "
                        "--kl-tokens or a larger device"
                    ) from error
            # Outside the handler, so that the failed attempt's tensors are free.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.batch_size = max(1, self.batch_size // 2)
            self._notify(f"out of memory: batch size is now {self.batch_size}")

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
        buckets = length_buckets([len(ids) for ids in encoded], self.batch_size, max_padding=1.0)
        for bucket in buckets:
            batch = [encoded[index] for index in bucket]
            generate_responses(
                self.lm,
                batch,
                max_tokens,
                rules,
                share_prefix=self.share_prefix,
                chosen=ChosenTokens(batch, sampling),
                into=[responses[index] for index in bucket],
            )
        return responses
