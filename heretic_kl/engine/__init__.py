"""Runs one frozen model under plans: batching, teacher forcing, generation, calibration.

Dimensions: P prompts, N scored positions, V vocabulary, L layers, D residual width; rows are the
scored positions of all prompts.
"""

from heretic_kl.engine.calibration import Calibration, find_batch_size, find_response_prefix
from heretic_kl.engine.engine import Engine, Reference, mean_kl
from heretic_kl.engine.generation import Answer, greedy_answers, stream_answer
from heretic_kl.engine.noise import NoiseFloor, measure_noise_floor

__all__ = [
    "Answer",
    "Calibration",
    "Engine",
    "NoiseFloor",
    "Reference",
    "find_batch_size",
    "find_response_prefix",
    "greedy_answers",
    "mean_kl",
    "measure_noise_floor",
    "stream_answer",
]
