"""From a loaded model to an engine that measures it: batch size, shared prefix, response prefix.

One step of a run (`pipeline`). Changes no setting, prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from heretic_kl.config import Settings
from heretic_kl.engine import (
    Calibration,
    Engine,
    continuing,
    find_batch_size,
    find_response_prefix,
    measure_noise_floor,
    tree_problem,
)
from heretic_kl.model import (
    LanguageModel,
    common_prefix,
    packed_bytes,
    prefix_problem,
    with_packed_weights,
)
from heretic_kl.prompts.sets import PromptSets

CALIBRATION_PROMPTS = 12
"""Of each kind, to look for a common response prefix."""
NOISE_PROMPTS = 16


def calibrate(
    lm: LanguageModel,
    settings: Settings,
    sets: PromptSets,
    *,
    site_residue: float,
    tell: Callable[[str, str], None],
    notify: Callable[[str], None],
) -> tuple[Engine, Calibration]:
    """The engine that measures candidates, and what was found out for it.

    Args:
        lm: the model.
        settings: of the run.
        sets: the prompts of the run.
        site_residue: see `Calibration`.
        tell: told the name and value of each finding.
        notify: told, in words, what a user should know.
    """
    responses = continuing(lm)
    if responses.problem is not None:
        notify(responses.problem)
    lm, memory = _packed(lm, settings.cache_memory_mb * 2**20, tell)
    sharing = _can_share_prefix(lm, sets, tell)
    problem = tree_problem(lm)
    tell("teacher forcing", "trees of tokens" if problem is None else f"rectangles: {problem}")
    size = settings.batch_size or find_batch_size(
        lm, sets["harmful", "validation"] + sets["harmless", "validation"], share_prefix=sharing
    )
    tell("batch size", str(size))
    engine = Engine(lm, batch_size=size, share_prefix=sharing, notify=notify)
    prefix = settings.response_prefix
    if prefix is None:
        prefix = find_response_prefix(engine, sets.sample(CALIBRATION_PROMPTS))
    tell("response prefix", repr(prefix) if prefix else "none")
    engine = Engine(
        replace(lm, chat=lm.chat.with_response_prefix(prefix)),
        batch_size=engine.batch_size,
        share_prefix=sharing,
        notify=notify,
        cache_bytes=memory,
    )
    floor = measure_noise_floor(
        engine.runner,
        engine.reference(sets["harmless", "validation"][:NOISE_PROMPTS], settings.kl_tokens),
        lm.architecture.layers,
        seed=settings.seed,
    )
    tell("KL noise floor", floor.text)
    return engine, Calibration(
        dtype=lm.dtype_name,
        device=str(lm.device),
        threads=torch.get_num_threads(),
        batch_size=engine.batch_size,
        response_prefix=prefix,
        noise_floor=floor,
        site_residue=site_residue,
    )


def _packed(
    lm: LanguageModel, memory: int, tell: Callable[[str, str], None]
) -> tuple[LanguageModel, int]:
    """The model with packed weights, if they fit in the memory, and what of it is left then."""
    size = packed_bytes(lm)
    if not 0 < size <= memory:
        return lm, memory
    tell("weights", f"laid out for the processor, {size / 2**20:.0f} MB")
    return with_packed_weights(lm), memory - size


def _can_share_prefix(
    lm: LanguageModel, sets: PromptSets, tell: Callable[[str, str], None]
) -> bool:
    lengths = []
    for prompts in sets.of("validation").values():
        encoded = [lm.chat.encode(prompt) for prompt in prompts]
        problem = prefix_problem(lm, encoded)
        if problem is not None:
            tell("shared prefix", f"off: {problem}")
            return False
        lengths.append(len(common_prefix(encoded)))
    tell("shared prefix", f"{' and '.join(map(str, sorted(set(lengths))))} tokens")
    return True
