"""The model that settings name, loaded and its sites verified: for a run and for an inspection."""

from __future__ import annotations

from dataclasses import dataclass

from heretic_kl.ablation import Component
from heretic_kl.config import Settings
from heretic_kl.errors import ConfigError
from heretic_kl.events import ModelLoaded
from heretic_kl.model import LanguageModel, ModelSource, load_model, verify_sites
from heretic_kl.run.teller import Teller


@dataclass(frozen=True)
class Loaded:
    """A model ready to be calibrated."""

    lm: LanguageModel
    site_residue: float
    """See `Calibration`."""
    components: tuple[Component, ...]
    """What of it may be edited."""


def load(settings: Settings, tell: Teller) -> Loaded:
    """Load the model of a run, verify its sites and say what it is.

    Raises:
        ModelError: see `load_model`; or its sites do not account for all that it writes.
    """
    with tell.stage("load", f"Loading {model_source(settings).short_name}"):
        lm = load_model_of(settings)
        residue = verify_sites(lm).residue
    edit = settings.edit
    components = lm.architecture.editable(edit.components, restore_norms=edit.norm != "none")
    for remark in lm.remarks(plain_text_wanted=settings.chat_template == "none"):
        tell.notice(remark)
    tell(
        ModelLoaded(
            name=lm.source.name,
            parameters=lm.parameter_count,
            layers=len(lm.architecture.layers),
            sites=len(lm.architecture.sites),
            dtype=lm.dtype_name,
            device=str(lm.device),
        )
    )
    return Loaded(lm, residue, components)


def model_source(settings: Settings) -> ModelSource:
    """Where the model comes from.

    Raises:
        ConfigError: the settings name no model.
    """
    if settings.model is None:
        raise ConfigError("no model given: set `model` to a hub id, a local folder or a .gguf file")
    return ModelSource(settings.model, settings.revision)


def load_model_of(settings: Settings) -> LanguageModel:
    """The same without a word; see `load_model` for what it raises."""
    return load_model(
        model_source(settings),
        base=None if settings.base is None else ModelSource.named(settings.base),
        dtype=settings.dtype,
        device=settings.device,
        device_map=settings.device_map,
        quantization=settings.quantization,
        trust_remote_code=settings.trust_remote_code,
        template=settings.chat_template,
        variables=settings.template_variables,
        layers=settings.edit.layers,
        sites=settings.edit.sites,
    )
