"""The model that settings name, loaded as they say: the same for a run and for an inspection."""

from __future__ import annotations

from heretic_kl.config import Settings
from heretic_kl.model import LanguageModel, ModelSource, load_model


def model_source(settings: Settings) -> ModelSource:
    """Where the model comes from; the command line refuses settings without one."""
    assert settings.model is not None
    return ModelSource(settings.model, settings.revision)


def load_model_of(settings: Settings) -> LanguageModel:
    """Load it.

    Raises:
        ModelError: see `load_model`.
    """
    return load_model(
        model_source(settings),
        base=None if settings.base is None else ModelSource(settings.base),
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        quantization=settings.quantization,
        trust_remote_code=settings.trust_remote_code,
        template=settings.chat_template,
        enable_thinking=settings.enable_thinking,
        layers=settings.edit.layers,
        sites=settings.edit.sites,
    )
