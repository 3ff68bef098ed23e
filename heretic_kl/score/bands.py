"""How far a model is from itself with its own weights rounded: what a KL is read against.

Every band is measured on that very model, over the same inputs, by the same code as candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine import (
    MemoryLimits,
    NoiseFloor,
    Runner,
    forced_sequences,
    measure_noise_floor,
)
from heretic_kl.kl import (
    DivergenceReduction,
    Interval,
    Reference,
    geometric_weights,
    prompt_means,
    standard_error,
)
from heretic_kl.model import likely_layers
from heretic_kl.model.rounding import rounded_weights
from heretic_kl.score.llama.reference import LlamaReference

BITS: Final = (8, 6, 5, 4, 3)
MOST_SEQUENCES, TOKENS_AT_ONCE = 16, 8192
"""Of a batch, where a file that llama.cpp runs is unpacked."""


class Band(NamedTuple):
    """The KL of the reference with its linear weights rounded; nats, as `Measurement.kl`."""

    bits: int
    kl: float
    standard_error: float | None
    """Clustered by prompt."""


@torch.no_grad()
def measure_bands(
    runner: Any,
    reference: Reference,
    reduction: DivergenceReduction,
    *,
    position_decay: float = 1.0,
    clusters: Tensor | None = None,
) -> tuple[Band, ...]:
    """Round the reference to each of `BITS` in turn, and measure it from itself.

    Args:
        runner: the reference, as it was run, see `AnyRunner`.
        reference: what it computed.
        reduction: what is measured.
        position_decay: as in `TeacherForcedKL`.
        clusters: (P,), of a table over text.

    A reference in llama.cpp is unpacked in `transformers` for this, and measured from itself there.

    Raises:
        ModelError: its weights are packed, or it cannot be loaded.
    """
    from heretic_kl.score.reference_run import logit_blocks

    if isinstance(runner, LlamaReference):
        runner = _in_transformers(runner, reference)
        hidden = runner.hidden_states(forced_sequences(reference))
        reference = replace(reference, hidden=hidden, logits=None)
    sequences, lm = forced_sequences(reference), runner.lm
    weights = geometric_weights(int(reference.mask.shape[1]), position_decay)
    bands = []
    for bits in BITS:
        blocks = partial(logit_blocks, runner, sequences, lm.head, f"rounded to {bits} bits")
        with rounded_weights(lm.model, bits):
            table = runner.limits.run(
                lambda blocks=blocks: reference.measure_blocks(
                    blocks(),
                    head=lm.head,
                    divergence=reduction.divergence,
                    temperature=reduction.temperature,
                )
            )
        means = prompt_means(replace(table, clusters=clusters), position_weights=weights)
        bands.append(Band(bits, float(means.mean()), standard_error(means)))
    return tuple(bands)


def _in_transformers(reference: LlamaReference, stored: Reference) -> Runner:
    """What runs the same file there, in batches of about so many tokens."""
    longest = max(len(sequence.fed) for sequence in forced_sequences(stored))
    limits = MemoryLimits(max(1, min(MOST_SEQUENCES, TOKENS_AT_ONCE // longest)))
    lm = reference.unpacked()
    lm.model.eval()
    return Runner(lm, limits, trees=False, progress=reference.progress)


def measure_floor(
    runner: Any, reference: Reference, sequences: int, reduction: DivergenceReduction
) -> NoiseFloor:
    """What an unchanged reference shows over the first of its sequences, in either back end."""
    if isinstance(runner, LlamaReference):
        few = forced_sequences(reference)[:sequences]
        return NoiseFloor(runner.noise_floor(few, reduction), None)
    return measure_noise_floor(
        runner,
        reference.first_prompts(sequences),
        likely_layers(runner.lm.model),
        divergence=reduction.divergence,
        temperature=reduction.temperature,
    )


def place_among(kl: float, bands: Sequence[Band], interval: Interval | None = None) -> str:
    """At which band a KL lies, or between which two, in words.

    Args:
        kl: nats.
        bands: at least one.
        interval: of the KL; a band inside it is not told from it.
    """
    if interval is not None:
        inside = [band for band in bands if interval.low <= band.kl <= interval.high]
        if inside:
            nearest = min(inside, key=lambda band: abs(band.kl - kl))
            return f"about {nearest.bits}-bit rounding of this model"
    nearer = [band for band in bands if band.kl <= kl]
    further = [band for band in bands if band.kl > kl]
    if not nearer:
        return f"less than {max(band.bits for band in bands)}-bit rounding of this model"
    if not further:
        return f"more than {min(band.bits for band in bands)}-bit rounding of this model"
    low = max(nearer, key=lambda band: band.kl)
    high = min(further, key=lambda band: band.kl)
    return f"between {low.bits}- and {high.bits}-bit rounding of this model"


def stored_bands(bands: Sequence[Band]) -> dict[str, float | None]:
    """Bands as settings of a stored reference; `bands_of` reads them."""
    means = {f"band_{band.bits}": band.kl for band in bands}
    return means | {f"band_{band.bits}_error": band.standard_error for band in bands}


def bands_of(settings: Mapping[str, Any]) -> tuple[Band, ...]:
    """The bands that a stored reference knows; raises as `_nats`."""
    names = [(bits, f"band_{bits}") for bits in BITS if f"band_{bits}" in settings]
    return tuple(
        Band(bits, _nats(settings, name), _nats_or_none(settings, f"{name}_error"))
        for bits, name in names
    )


def floor_of(settings: Mapping[str, Any]) -> NoiseFloor | None:
    """The noise floor that a stored reference knows; None: none. Raises as `_nats`."""
    if "batching_floor" not in settings:
        return None
    rounding = _nats_or_none(settings, "rounding_floor")
    return NoiseFloor(_nats(settings, "batching_floor"), rounding)


def _nats_or_none(settings: Mapping[str, Any], name: str) -> float | None:
    return None if settings[name] is None else _nats(settings, name)


def _nats(settings: Mapping[str, Any], name: str) -> float:
    """A stored figure.

    Raises:
        KeyError: there is none.
        ValueError: it is no finite number of 0 or more.
    """
    value = settings[name]
    if not isinstance(value, int | float) or not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}")
    return float(value)
