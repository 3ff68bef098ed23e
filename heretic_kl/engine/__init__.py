"""Runs one frozen model under plans: batching, teacher forcing, generation, calibration.

Dimensions: P prompts, N scored positions, V vocabulary, L layers, D residual width; rows are the
scored positions of all prompts.
"""

from heretic_kl.engine.calibration import Calibration, find_batch_size, find_response_prefix
from heretic_kl.engine.engine import Engine
from heretic_kl.engine.generation.cache_check import continuing
from heretic_kl.engine.generation.generate import (
    Answer,
    ChosenTokens,
    generate_answers,
    stream_answer,
)
from heretic_kl.engine.noise import NoiseFloor, measure_noise_floor
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.teacher_forcing.reference import (
    answer_and_force,
    forced_sequences,
    mean_kl,
    model_identity,
)
from heretic_kl.engine.teacher_forcing.tree_check import tree_problem

__all__ = [
    "Answer",
    "Calibration",
    "ChosenTokens",
    "Engine",
    "NoiseFloor",
    "Runner",
    "answer_and_force",
    "find_batch_size",
    "find_response_prefix",
    "forced_sequences",
    "generate_answers",
    "mean_kl",
    "measure_noise_floor",
    "model_identity",
    "stream_answer",
    "continuing",
    "tree_problem",
]
