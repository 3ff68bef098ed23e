"""From a loaded model to an engine that measures it: batch size, shared prefix, response prefix.

One step of a run. Changes no setting, prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from heretic_kl.config import Settings
from heretic_kl.engine import (
    Calibration,
    Engine,
    SharedResults,
    find_batch_size,
    find_response_prefix,
    measure_noise_floor,
)
from heretic_kl.model import LanguageModel, common_prefix, packed_bytes
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.run.engines import EngineOptions, build_engine
from heretic_kl.run.setup.load import Loaded
from heretic_kl.run.teller import Teller

CALIBRATION_PROMPTS = 12
"""Of each kind, to look for a common response prefix."""
NOISE_PROMPTS = 16


@dataclass(frozen=True)
class Calibrated:
    """The engine that measures candidates, and what was found out for it."""

    engine: Engine
    options: EngineOptions
    calibration: Calibration


def calibrate(
    loaded: Loaded,
    settings: Settings,
    sets: PromptSets,
    tell: Teller,
    batch_size: int | None,
    shared: SharedResults | None = None,
) -> Calibrated:
    """Find out how the model is best run, and what it shows without any edit.

    `batch_size` is what the study was begun with; None: it is new. `shared` is what other
    workers may have computed.
    """
    lm = loaded.lm
    problem = lm.capabilities.cache_problem
    if problem is not None:
        tell.notice(f"responses are generated without a cache, which is slower: {problem}")
    options = _find_options(lm, settings, sets, tell, batch_size)
    engine = build_engine(lm, options, notify=tell.notice, shared=shared)
    prefix = settings.response_prefix
    if prefix is None:
        prefix = find_response_prefix(engine, sets.sample(CALIBRATION_PROMPTS))
    tell.finding("response prefix", repr(prefix) if prefix else "none")
    options = replace(options, batch_size=engine.batch_size)
    lm = replace(lm, chat=lm.chat.with_response_prefix(prefix))
    engine = build_engine(lm, options, notify=tell.notice, shared=shared)
    floor = measure_noise_floor(
        engine.runner,
        # With states of this machine's own pass, wherever the shared ones come from.
        engine.reference_under(
            None, sets["harmless", "validation"][:NOISE_PROMPTS], settings.kl_tokens
        ),
        lm.architecture.layers,
        seed=settings.seed,
    )
    tell.finding("KL noise floor", floor.text)
    calibration = Calibration(
        dtype=lm.dtype_name,
        device=str(lm.device),
        threads=torch.get_num_threads(),
        batch_size=engine.batch_size,
        response_prefix=prefix,
        noise_floor=floor,
        site_residue=loaded.site_residue,
    )
    return Calibrated(engine, options, calibration)


def _find_options(
    lm: LanguageModel, settings: Settings, sets: PromptSets, tell: Teller, batch_size: int | None
) -> EngineOptions:
    memory = settings.cache_memory_mb * 2**20
    packing = packed_bytes(lm)
    packs = 0 < packing <= memory
    if packs:
        tell.finding("weights", f"laid out for the processor, {packing / 2**20:.0f} MB")
    for name, value in lm.capabilities.lines():
        tell.finding(name, value)
    _tell_shared_prefix(lm, sets, tell)
    size = settings.batch_size or batch_size
    if size is None:
        prompts = sets["harmful", "validation"] + sets["harmless", "validation"]
        size = find_batch_size(lm, prompts)
    source = " (the study's)" if batch_size and not settings.batch_size else ""
    tell.finding("batch size", f"{size}{source}")
    return EngineOptions(
        batch_size=size,
        cache_bytes=memory - packing if packs else memory,
        packed_weights=packs,
    )


def _tell_shared_prefix(lm: LanguageModel, sets: PromptSets, tell: Teller) -> None:
    lengths = set()
    for prompts in sets.of("validation").values():
        encoded = [lm.chat.encode(prompt) for prompt in prompts]
        if not lm.capabilities.shares_prefix(max(map(len, encoded))):
            return
        lengths.add(len(common_prefix(encoded)))
    tell.finding("shared prefix length", f"{' and '.join(map(str, sorted(lengths)))} tokens")
