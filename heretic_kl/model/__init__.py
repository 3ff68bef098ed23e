"""A Hugging Face model seen as layers and sites: loading, architecture, hooks, residuals.

Dimensions: B sequences, T positions, L layers, D residual width, F input width of a site.
"""

from heretic_kl.model.architecture import Architecture, Site, find_architecture
from heretic_kl.model.chat import ChatEncoder, close_thought
from heretic_kl.model.hooks import edited, on_layer_outputs
from heretic_kl.model.loading import LanguageModel, ModelSource, load_model
from heretic_kl.model.proof import prove_sites
from heretic_kl.model.residuals import last_token_residuals, right_padded

__all__ = [
    "Architecture",
    "ChatEncoder",
    "LanguageModel",
    "ModelSource",
    "Site",
    "close_thought",
    "edited",
    "find_architecture",
    "last_token_residuals",
    "load_model",
    "on_layer_outputs",
    "prove_sites",
    "right_padded",
]
