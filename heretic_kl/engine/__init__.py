"""Runs one frozen model under plans: batching, teacher forcing, generation, calibration.

Dimensions: P prompts, N scored positions, V vocabulary, L layers, D residual width; rows are the
scored positions of all prompts.
"""

from heretic_kl.engine.calibration import Calibration, find_batch_size, find_response_prefix
from heretic_kl.engine.engine import Engine
from heretic_kl.engine.generation.generate import (
    ChosenTokens,
    Response,
    generate_responses,
    stream_response,
)
from heretic_kl.engine.memory_limits import MemoryLimits
from heretic_kl.engine.noise import NoiseFloor, measure_noise_floor
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.shared import SharedResults
from heretic_kl.engine.teacher_forcing.reference import (
    forced_sequences,
    mean_kl,
    model_identity,
    reference_from,
    with_responses,
)

__all__ = [
    "Response",
    "Calibration",
    "ChosenTokens",
    "Engine",
    "MemoryLimits",
    "NoiseFloor",
    "Runner",
    "SharedResults",
    "find_batch_size",
    "find_response_prefix",
    "forced_sequences",
    "generate_responses",
    "mean_kl",
    "measure_noise_floor",
    "model_identity",
    "reference_from",
    "stream_response",
    "with_responses",
]
