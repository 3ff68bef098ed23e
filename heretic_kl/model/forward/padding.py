"""Token ids of several sequences as one rectangle. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def right_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the right with 0, and each row's last real position (B,)."""
    longest = max(len(sequence) for sequence in sequences)
    padded = [list(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    last = torch.tensor([len(sequence) - 1 for sequence in sequences])
    return torch.tensor(padded, device=device), last


def left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) padded on the left with 0, and the attention mask (B, T) of 0 and 1."""
    longest = max(len(sequence) for sequence in sequences)
    gaps = [longest - len(sequence) for sequence in sequences]
    tokens = [[0] * gap + list(sequence) for gap, sequence in zip(gaps, sequences, strict=True)]
    mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
