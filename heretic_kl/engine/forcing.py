"""Final hidden states at scored positions, teacher-forced. Knows nothing about divergences.

Sequences are padded on the right and run without an attention mask: under causal attention a
padded position cannot change one before it. What all prompts begin with runs once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heretic_kl.engine.batching import length_buckets
from heretic_kl.model import CausalModel, PrefixCache, common_prefix, right_padded


@dataclass(frozen=True)
class ForcedSequence:
    """A prompt and the answer it is forced to have."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """N tokens; each is predicted at a scored position, the last one is not fed."""

    @property
    def fed(self) -> tuple[int, ...]:
        """What goes into the model: everything but the last answer token."""
        return self.prompt + self.answer[:-1]

    @property
    def scored(self) -> range:
        """Positions whose logits predict the answer tokens."""
        return range(len(self.prompt) - 1, len(self.prompt) - 1 + len(self.answer))


@torch.no_grad()
def forced_hidden_states(
    lm: CausalModel,
    sequences: Sequence[ForcedSequence],
    max_rows: int,
    *,
    share_prefix: bool = True,
    extra_padding: int = 0,
) -> Tensor:
    """Hidden states after the final norm at every scored position.

    Args:
        lm: the model, edited or not.
        sequences: what to feed; a prompt of at least one token each.
        max_rows: most sequences in a batch.
        share_prefix: run the tokens that all prompts begin with once.
        extra_padding: padding added to every batch, to measure what padding changes.

    Returns:
        (rows, D) in the model's dtype and on its head's device, sequence by sequence, position
        by position.
    """
    parts: list[Tensor | None] = [None] * len(sequences)
    shared = common_prefix([s.prompt for s in sequences]) if share_prefix else ()
    kept = PrefixCache(lm, shared)
    rest = [s.fed[kept.length :] for s in sequences]
    for bucket in length_buckets([len(ids) for ids in rest], max_rows):
        fed = [rest[index] for index in bucket]
        tokens, _last = right_padded(fed, lm.device)
        if extra_padding:
            tokens = torch.nn.functional.pad(tokens, (0, extra_padding))
        arguments = kept.arguments(lm, len(bucket))
        hidden = lm.body(input_ids=tokens, **arguments).last_hidden_state
        for row, index in enumerate(bucket):
            scored = sequences[index].scored
            start, stop = scored.start - kept.length, scored.stop - kept.length
            parts[index] = hidden[row, start:stop].to(lm.head.weight.device, copy=True)
    return torch.cat([part for part in parts if part is not None])
