"""Tiny random models of every model type that transformers can load as a causal language model.

Built from a config and a seed, without downloads, in well under a second and 5 MB a model. Knows
nothing about layers, sites, prompts or tokenizers.
"""

from heretic_kl.testing.zoo.build import tiny_model
from heretic_kl.testing.zoo.configs import model_types, tiny_config
from heretic_kl.testing.zoo.kinds import Kind, kind_of
from heretic_kl.testing.zoo.quirks import (
    FULL_PRECISION_ONLY,
    NEEDS_LIBRARY,
    NOT_RELOADED,
    OWN_CACHE,
)
from heretic_kl.testing.zoo.shrink import VOCABULARY

__all__ = [
    "FULL_PRECISION_ONLY",
    "NEEDS_LIBRARY",
    "NOT_RELOADED",
    "OWN_CACHE",
    "VOCABULARY",
    "Kind",
    "kind_of",
    "model_types",
    "tiny_config",
    "tiny_model",
]
