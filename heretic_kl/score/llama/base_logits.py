"""llama.cpp's file of base logits, read and written. Runs no model, computes no divergence.

Little-endian, as `llama-perplexity --save-all-logits` writes it: the magic `_logits_`; int32 tokens
of a window, vocabulary, number of windows; int32 token ids of all windows; then, for each position
of the second half of each window but the last, float32 scale, float32 smallest log-probability, and
a uint16 for each token, one more if their number is odd. A log-probability is
`scale * level + smallest`. Tokens 16 nats or more below the best one have level 0: clipped.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy
import torch
from torch import Tensor

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError

MAGIC: Final = b"_logits_"
CLIPPED_BELOW: Final = 16.0
"""Nats below the best token."""
LEVELS: Final = 65535
_HEAD: Final = struct.Struct("<3i")


@dataclass(frozen=True)
class BaseLogits:
    """A file, mapped into memory: only rows that are asked for are read. A `RowLogits`."""

    path: Path
    context: int
    vocabulary: int
    tokens: Tensor  # (windows, context) int64
    levels: Any  # (rows, width) uint16, the first four of each row are scale and smallest

    @classmethod
    def open(cls, path: Path) -> BaseLogits:
        """Open a file.

        Raises:
            MeasurementError: it is no such file, or cut off.
        """
        try:
            with path.open("rb") as file:
                head = file.read(len(MAGIC) + _HEAD.size)
            size = path.stat().st_size
        except OSError as error:
            raise MeasurementError(f"{path}: cannot be read: {error.strerror}") from None
        if head[: len(MAGIC)] != MAGIC or len(head) < len(MAGIC) + _HEAD.size:
            raise MeasurementError(f"{path}: not a file of base logits of llama.cpp")
        context, vocabulary, windows = _HEAD.unpack(head[len(MAGIC) :])
        if min(context - 2, vocabulary, windows) < 1:
            raise MeasurementError(
                f"{path}: holds {windows} windows of {context} tokens, vocabulary {vocabulary}"
            )
        rows, width = windows * scored_rows(context), row_width(vocabulary)
        start = len(head) + 4 * windows * context
        if size != start + 2 * rows * width:
            raise MeasurementError(
                f"{path}: has {size} bytes, where {windows} windows of {context} tokens take "
                f"{start + 2 * rows * width}: it was cut off, or is of another version"
            )
        tokens = numpy.fromfile(path, "<i4", windows * context, offset=len(head))
        levels = numpy.memmap(path, "<u2", "r", offset=start, shape=(rows, width))
        ids = torch.from_numpy(tokens.astype(numpy.int64)).reshape(windows, context)
        return cls(path, context, vocabulary, ids, levels)

    @property
    def rows(self) -> int:
        """Number of scored positions."""
        return int(self.levels.shape[0])

    def stored(self, rows: Tensor) -> Tensor:
        """Log-probabilities (n, V) float32 as llama.cpp reads them, the smallest where clipped."""
        levels = numpy.ascontiguousarray(self.levels[rows.numpy()])
        facts = torch.from_numpy(levels[:, :4].copy().view("<f4"))
        numbers = torch.from_numpy(levels[:, 4 : 4 + self.vocabulary].astype(numpy.float32))
        return numbers.mul_(facts[:, :1]).add_(facts[:, 1:])

    def clipped(self, rows: Tensor) -> Tensor:
        """(n, V) bool: tokens of which only an upper bound is known."""
        levels = numpy.ascontiguousarray(self.levels[rows.numpy()])
        spread = levels[:, :2].copy().view("<f4") * LEVELS
        # A row of less than 16 nats from best to worst has only its worst token at level 0.
        cut = spread > CLIPPED_BELOW * (1.0 - 1e-6)
        return torch.from_numpy((levels[:, 4 : 4 + self.vocabulary] == 0) & cut)

    def of(self, rows: Tensor) -> Tensor:
        """Log-probabilities (n, V) float32, -inf for clipped tokens."""
        return self.stored(rows).masked_fill_(self.clipped(rows), -math.inf)

    def sequences(self, first_token: int | None) -> tuple[ForcedSequence, ...]:
        """What llama.cpp feeds: each window, begun by `first_token` where there is one."""
        return tuple(window_sequence(window, first_token) for window in self.tokens.tolist())


def window_sequence(window: Sequence[int], first_token: int | None) -> ForcedSequence:
    """A window of which the second half is scored, `first_token` in place of its first."""
    scored = scored_rows(len(window))
    if first_token is not None:
        window = [first_token, *window[1:]]
    return ForcedSequence(tuple(window[:-scored]), tuple(window[-scored:]))


def scored_rows(context: int) -> int:
    """Positions that llama.cpp scores of a window."""
    return context - 1 - context // 2


def row_width(vocabulary: int) -> int:
    """uint16 numbers of a scored position."""
    return 2 * ((vocabulary + 1) // 2) + 4


def write_head(file: BinaryIO, windows: Sequence[Sequence[int]], vocabulary: int) -> None:
    """Write all that precedes the first scored position."""
    file.write(MAGIC + _HEAD.pack(len(windows[0]), vocabulary, len(windows)))
    file.write(numpy.asarray(windows, "<i4").tobytes())


def write_rows(
    file: BinaryIO,
    logits: Tensor,  # (n, V) raw
) -> None:
    """Write scored positions, rounded and clipped as llama.cpp does it."""
    wide = logits.detach().to("cpu", torch.float32)
    top = wide.amax(dim=-1, keepdim=True)
    smallest = torch.maximum(wide.amin(dim=-1, keepdim=True), top - CLIPPED_BELOW)
    scale = (top - smallest) / LEVELS
    steps = ((wide - smallest) / scale.clamp_min(1e-30)).round_().clamp_(0, LEVELS)
    levels = numpy.zeros((len(wide), row_width(wide.shape[1])), "<u2")
    levels[:, 4 : 4 + wide.shape[1]] = steps.numpy()
    facts = torch.cat([scale, smallest - top - (wide - top).logsumexp(-1, keepdim=True)], dim=1)
    levels[:, :4] = facts.numpy().astype("<f4").view("<u2")
    file.write(levels.tobytes())
