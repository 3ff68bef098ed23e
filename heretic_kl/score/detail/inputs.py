"""What every model was fed, as text for people. Runs no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch import Tensor

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.model import thought_length

MOST_CHARACTERS: Final = 200
"""Of a text that only names a prompt or a place."""
CONTEXT_TOKENS: Final = 12
"""Before a position, to recognize it by."""


@dataclass(frozen=True, eq=False)
class ForcedInputs:
    """The sequences of one reference."""

    sequences: tuple[ForcedSequence, ...]
    tokenizer: Any = None
    """None: a stored reference without one; token ids stand for text."""
    names: Sequence[str] = ()
    """What users asked, prompt by prompt; (): the beginnings of sequences name them."""

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones too."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return str(self.tokenizer.decode(list(tokens)))

    def name(self, prompt: int) -> str:
        """By what a prompt is recognized."""
        if self.names:
            return shortened(self.names[prompt])
        return shortened(self.text(self.sequences[prompt].prompt[:MOST_CHARACTERS]))

    def before(self, prompt: int, position: int) -> str:
        """The text before a position of a response."""
        sequence = self.sequences[prompt]
        tokens = [*sequence.prompt, *sequence.response[:position]]
        return self.text(tokens[-CONTEXT_TOKENS:])

    @cached_property
    def thinking(self) -> Tensor | None:
        """(P, longest) bool, positions of a chain of thought; None: there are none."""
        if self.tokenizer is None:
            return None
        longest = max(len(sequence.response) for sequence in self.sequences)
        inside = torch.zeros(len(self.sequences), longest, dtype=torch.bool)
        for row, sequence in zip(inside, self.sequences, strict=True):
            prompt = self.text(sequence.prompt)
            if not thought_length(prompt, self.text(sequence.response)):
                continue
            pieces = [self.text([token]) for token in sequence.response]
            left = thought_length(prompt, "".join(pieces))
            for position, piece in enumerate(pieces):
                row[position] = left > 0
                left -= len(piece)
        return inside if bool(inside.any()) else None


def shortened(text: str) -> str:
    """One line of at most `MOST_CHARACTERS`."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
