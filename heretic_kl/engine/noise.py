"""The KL that an unchanged model shows when only the arithmetic changes. Knows no plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from heretic_kl.engine.runner import Runner
from heretic_kl.engine.teacher_forcing.forward import forced_hidden_states
from heretic_kl.engine.teacher_forcing.reference import forced_sequences, mean_kl
from heretic_kl.kl import Divergence, Reference
from heretic_kl.model import on_layer_outputs

PERTURBATION = 2.0**-9
"""Relative size of bfloat16's rounding error: half a unit in its eighth significant bit."""


@dataclass(frozen=True)
class NoiseFloor:
    """KL in nats of the model against itself, mean over positions, then prompts."""

    batching: float
    """Only batch size, padding and prefix sharing differ; a KL below it is no different from 0."""
    rounding: float | None
    """Each layer's output is perturbed by up to 2^-9 of itself, as rounding to bfloat16 does.
    Storing a model in bfloat16 costs about this much. None: the model's layers are not known."""

    @property
    def value(self) -> float:
        """The floor below which a KL says nothing about the edit."""
        return self.batching

    @property
    def text(self) -> str:
        """Both floors, for people."""
        rounding = "" if self.rounding is None else f", {self.rounding:.1e} (bfloat16 rounding)"
        return f"{self.batching:.1e} nats (batching){rounding}"


def measure_noise_floor(
    runner: Runner,
    reference: Reference,
    layers: Sequence[nn.Module] | None,
    *,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    seed: int = 0,
) -> NoiseFloor:
    """Measure both floors of a model over the responses of a reference it computed itself.

    Without `layers`, whose outputs the rounding floor perturbs, that floor is not measured.
    """
    lm, sequences = runner.lm, forced_sequences(reference)
    rows = max(1, runner.limits.batch_size // 2 - 1)
    distance = partial(
        mean_kl, reference, head=lm.head, divergence=divergence, temperature=temperature
    )
    rebatched = forced_hidden_states(lm, sequences, rows, share_prefix=False, extra_padding=5)
    rounding = None
    if layers is not None:
        generator = torch.Generator().manual_seed(seed)
        with on_layer_outputs(layers, partial(_perturb, generator)):
            perturbed = runner.hidden_states(sequences, "noise floor")
        rounding = distance(perturbed)
    return NoiseFloor(batching=distance(rebatched), rounding=rounding)


def _perturb(generator: torch.Generator, _layer: int, hidden: Tensor) -> Tensor:
    # Less than one step of the dtype would round back to where it was.
    step = max(PERTURBATION, torch.finfo(hidden.dtype).eps)
    noise = (torch.rand(hidden.shape, generator=generator) * 2 - 1).to(hidden.device)
    return (hidden.float() * (1 + step * noise)).to(hidden.dtype)
