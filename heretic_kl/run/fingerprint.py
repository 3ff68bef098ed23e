"""What makes two trials comparable: the facts a study is tied to. Opens no storage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from heretic_kl.config import Settings
from heretic_kl.engine import Calibration
from heretic_kl.kl import METRIC_VERSION
from heretic_kl.model import LanguageModel, ModelSource
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.scoring import Suite, scorer_code

SPACE_VERSION = 1
"""Raised when the search space or the meaning of a parameter changes."""
SAMPLES = 4096


def study_fingerprint(
    settings: Settings,
    lm: LanguageModel,
    calibration: Calibration,
    prompts: PromptSets,
    suite: Suite,
) -> dict[str, Any]:
    """Everything that a trial's parameters or scores depend on, JSON-ready.

    A model is known by a sample of its weights, not by its path: moved folders resume.
    """
    return {
        "model weights": weights_fingerprint(lm),
        "dtype": calibration.dtype,
        "chat template": hashlib.sha256(str(lm.chat.template).encode()).hexdigest(),
        "enable_thinking": settings.enable_thinking,
        "response_prefix": calibration.response_prefix,
        "seed": settings.seed,
        "kl_tokens": settings.kl_tokens,
        "max_response_tokens": settings.max_response_tokens,
        "edit": settings.edit.model_dump(mode="json"),
        "directions": settings.directions.model_dump(mode="json"),
        "scorers": {
            spec.name: {
                "role": spec.role,
                "code": scorer_code(spec.use),
                "settings": suite.scorers[spec.name].settings.model_dump(mode="json"),
                "identity": dict(suite.scorers[spec.name].identity()),
            }
            for spec in suite.specs
        },
        "prompts": prompts.fingerprints(),
        "metric version": METRIC_VERSION,
        "space version": SPACE_VERSION,
    }


def default_study_name(source: ModelSource, fingerprint: Mapping[str, Any]) -> str:
    """A name that differs whenever the fingerprint does: other settings make another study."""
    digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return f"{source.short_name}-{digest[:8]}"


def weights_fingerprint(lm: LanguageModel) -> str:
    """sha256 over a strided sample of the head's and every site's weights."""
    digest = hashlib.sha256(lm.head.fingerprint().encode())
    for site in lm.architecture.sites:
        for parameter in site.module.parameters():
            flat = parameter.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // SAMPLES)]
            digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
