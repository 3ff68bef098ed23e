"""The one place where a run builds engines: trials and saved models are measured alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from heretic_kl.engine import Engine, SharedResults
from heretic_kl.model import LanguageModel, packed_bytes, with_packed_weights


@dataclass(frozen=True)
class EngineOptions:
    """How a model is run, whichever it is: found for the unedited model, kept for a saved one."""

    batch_size: int
    cache_bytes: int
    """What the engine may keep of the unedited model."""
    packed_weights: bool
    """Linear layers read copies of their weights that are laid out for the CPU."""


def build_engine(
    lm: LanguageModel,
    options: EngineOptions,
    *,
    notify: Callable[[str], None],
    original: Engine | None = None,
    shared: SharedResults | None = None,
) -> Engine:
    """An engine that runs a model as the options say.

    `original` is the engine of the unedited model, where `lm` is a saved one; `shared` is what
    workers share of the unedited one.
    """
    has_packed_weights = original is not None and original.lm is lm  # an adapter on the original
    if options.packed_weights and not has_packed_weights and packed_bytes(lm):
        lm = with_packed_weights(lm)
    return Engine(
        lm,
        batch_size=options.batch_size,
        cache_bytes=options.cache_bytes,
        original=original,
        notify=notify,
        shared=shared,
    )
