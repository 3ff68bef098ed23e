"""A GGUF file in llama.cpp as the reference, run in step with each candidate. No statistics.

No logits are kept: a block of the reference's is computed when the candidate's is there. So both
files are in memory at once, mapped, and a file measured from itself is at exactly 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine import reference_from
from heretic_kl.engine.runner import Progress
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import DivergenceReduction, Reference, ReferenceIdentity, vocabulary_hash
from heretic_kl.model import CausalModel, ChatEncoder, ModelSource
from heretic_kl.requests import Sampling
from heretic_kl.score.llama.model import LlamaModel

FLOOR_ROWS = 3
"""Rows at once of the pass that shows what batching changes."""


class LiveLogits:
    """A `RowLogits` that runs its model, one block after the other.

    Args:
        model: of the reference.
        sequences: what every model is fed.
        in_step: candidates are files in llama.cpp, too, and ask for the blocks that they make.
    """

    def __init__(
        self, model: LlamaModel, sequences: Sequence[ForcedSequence], *, in_step: bool = True
    ) -> None:
        self.model = model
        self._sequences = sequences
        self._in_step = in_step
        self._starts = [0, *accumulate(len(sequence.response) for sequence in sequences)]
        self._next = -1
        self._blocks: Iterator[Tensor] = iter(())
        self._left = torch.empty(0)

    @property
    def rows(self) -> int:
        """Number of scored positions."""
        return self._starts[-1]

    def of(self, rows: Tensor) -> Tensor:
        """Raw logits (n, V) of some rows.

        Every sequence runs once if its rows are asked for one after the other, whatever comes
        before and after it; what is held is no more than these rows and a block.

        Raises:
            MeasurementError: in step, other rows than a block's, as of a candidate in another
                back end.
        """
        logits = [self._take(first, count) for first, count in _consecutive(rows.tolist())]
        if self._in_step and (len(logits) > 1 or len(self._left)):
            raise MeasurementError(
                "the reference runs in llama.cpp, in step with its candidates: these must be .gguf "
                "files, or pass --backend transformers"
            )
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def blocks(self) -> Iterator[Tensor]:
        """All logits in order, block by block; `of` begins anew afterwards."""
        self._next = -1
        return self._from(0)

    def _take(self, first: int, count: int) -> Tensor:
        """Some consecutive rows."""
        if first != self._next:
            start = self._starts[bisect_right(self._starts, first) - 1]
            self._blocks, self._left, self._next = self._from(start), torch.empty(0), start
            for _ in range(start, first, self.model.block_rows):
                self._take(self._next, min(self.model.block_rows, first - self._next))
        parts = []
        wanted = count
        while wanted:
            if not len(self._left):
                self._left = next(self._blocks)
            parts.append(self._left[:wanted])
            wanted -= len(parts[-1])
            self._left = self._left[len(parts[-1]) :]
        self._next = first + count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _from(self, row: int) -> Iterator[Tensor]:
        for sequence in self._sequences[self._starts.index(row) :]:
            yield from self.model.blocks(sequence)


class LlamaReference:
    """A file that is to be the reference; it stands where a `CausalModel` does, and its runner.

    Args:
        source: a GGUF file.
        chat: of its tokenizer.
        cache_type: one of `CACHE_TYPES`.
        on_gpu: see `LlamaModel`.
        unpacked: loads the same file in `transformers`.
    """

    def __init__(
        self,
        source: ModelSource,
        chat: ChatEncoder,
        *,
        cache_type: str,
        on_gpu: bool,
        unpacked: Callable[[], CausalModel],
    ) -> None:
        assert source.gguf_file is not None
        self.chat = chat
        self._path = source.gguf_file
        self._cache_type = cache_type
        self._on_gpu = on_gpu
        self.unpacked = unpacked
        self.progress: Progress = lambda part, done, total: None
        self._model: LlamaModel | None = None
        self._context = 0

    def responses(
        self,
        encoded: Sequence[Sequence[int]],
        max_tokens: int,
        sampling: Sampling | None = None,
    ) -> list[LlamaResponse]:
        """Greedy responses, as `Runner.responses` gives them.

        Raises:
            MeasurementError: drawn ones are asked for.
        """
        if sampling is not None:
            raise MeasurementError(
                "a reference in llama.cpp responds greedily: leave out --response, or pass "
                "--backend transformers"
            )
        model = self._opened(max(len(prompt) for prompt in encoded) + max_tokens)
        responses = []
        for done, prompt in enumerate(encoded):
            self.progress("responses", done, len(encoded))
            responses.append(LlamaResponse(model.respond(prompt, max_tokens)))
        self.progress("responses", len(encoded), len(encoded))
        return responses

    def reference(
        self,
        sequences: Sequence[ForcedSequence],
        positions: int,
        settings: Mapping[str, Any],
    ) -> Reference:
        """What the model says over the sequences, whenever it is asked.

        Args:
            sequences: what every model is fed.
            positions: N, most scored positions of a sequence.
            settings: see `ReferenceIdentity`.
        """
        model = self._opened(max(len(sequence.fed) for sequence in sequences))
        kind = kind_of(model, self._cache_type)
        identity = ReferenceIdentity(
            vocabulary_hash(self.chat.tokenizer.get_vocab()),
            model.vocabulary,
            settings={**settings, "dtype": kind},
        )
        rows = sum(len(sequence.response) for sequence in sequences)
        shape = reference_from(sequences, positions, torch.empty(rows, 0), identity)
        return replace(shape, hidden=None, logits=LiveLogits(model, sequences))

    def noise_floor(
        self, sequences: Sequence[ForcedSequence], reduction: DivergenceReduction
    ) -> float:
        """Mean KL in nats between the model and itself, a few positions at a time.

        Both run in step, in two contexts of one model: a block of logits of each is held.

        Raises:
            ModelError: llama.cpp cannot hold a second context.
        """
        model = self._opened(max(len(sequence.fed) for sequence in sequences))
        tokens = torch.tensor([token for sequence in sequences for token in sequence.response])
        means, row = [], 0
        with closing(model.beside()) as beside:
            beside.block_rows = FLOOR_ROWS
            live = LiveLogits(beside, sequences, in_step=False)
            for sequence in sequences:
                values = []
                for whole in model.blocks(sequence):
                    rows = torch.arange(row, row + len(whole))
                    values.append(reduction(whole, live.of(rows), tokens[rows]).values)
                    row += len(whole)
                means.append(torch.cat(values).mean())
        return float(torch.stack(means).mean())

    def _opened(self, context: int) -> LlamaModel:
        if self._model is None or context > self._context:
            if self._model is not None:
                self._model.close()
            self._context = context
            self._model = LlamaModel(
                self._path, context=context, cache_type=self._cache_type, on_gpu=self._on_gpu
            )
        return self._model


def _consecutive(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Runs of consecutive rows: the first of each and how many."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end] != rows[end - 1] + 1:
            yield rows[start], end - start
            start = end


class LlamaResponse(NamedTuple):
    """A response, the end token included."""

    tokens: Sequence[int]

    def reference_tokens(self, most: int) -> Sequence[int]:
        """The first tokens of it."""
        return self.tokens[:most]


def kind_of(model: LlamaModel, cache_type: str) -> str:
    """What a file computes in, for people."""
    cache = "" if cache_type == "f16" else f", {cache_type} cache"
    return f"{model.quantization}{cache}, llama.cpp"
