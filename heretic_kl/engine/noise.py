"""The KL that an unchanged model shows when only the arithmetic changes. Knows no plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from heretic_kl.engine.engine import Engine, mean_kl
from heretic_kl.engine.forcing import forced_hidden_states
from heretic_kl.model import on_layer_outputs
from heretic_kl.prompts import Prompt

PERTURBATION = 2.0**-9
"""Relative size of bfloat16's rounding error: half a unit in its eighth significant bit."""


@dataclass(frozen=True)
class NoiseFloor:
    """Forward KL in nats of the model against itself, mean over positions, then prompts."""

    batching: float
    """Only batch size, padding and prefix sharing differ; a KL below it is no different from 0."""
    rounding: float
    """Each layer's output is perturbed by up to 2^-9 of itself, as rounding to bfloat16 does.
    Storing a model in bfloat16 costs about this much."""

    @property
    def value(self) -> float:
        """The floor below which a KL says nothing about the edit."""
        return self.batching


def measure_noise_floor(
    engine: Engine, prompts: Sequence[Prompt], tokens: int, *, seed: int = 0
) -> NoiseFloor:
    """Measure both floors on these prompts, `tokens` positions each."""
    reference = engine.reference(tuple(prompts), tokens)
    rows = max(1, engine.batch_size // 2 - 1)
    rebatched = forced_hidden_states(
        engine.lm, reference.sequences, rows, share_prefix=False, extra_padding=5
    )
    generator = torch.Generator().manual_seed(seed)
    with on_layer_outputs(engine.lm.architecture, partial(_perturb, generator)):
        perturbed = engine.hidden_states(None, tuple(prompts), tokens)
    return NoiseFloor(
        batching=mean_kl(reference, rebatched, engine.lm.head),
        rounding=mean_kl(reference, perturbed, engine.lm.head),
    )


def _perturb(generator: torch.Generator, _layer: int, hidden: Tensor) -> Tensor:
    # Less than one step of the dtype would round back to where it was.
    step = max(PERTURBATION, torch.finfo(hidden.dtype).eps)
    noise = (torch.rand(hidden.shape, generator=generator) * 2 - 1).to(hidden.device)
    return (hidden.float() * (1 + step * noise)).to(hidden.dtype)
