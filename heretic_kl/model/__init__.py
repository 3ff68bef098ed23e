"""A Hugging Face model seen as layers and sites: loading, architecture, hooks, residuals.

Dimensions: B sequences, T positions, L layers, D residual width, F input width of a site.
"""

from heretic_kl.model.architecture import Architecture, Site, find_architecture
from heretic_kl.model.chat import ChatEncoder, close_thought, thought_left_open
from heretic_kl.model.hooks import edited, on_layer_outputs
from heretic_kl.model.loading import LanguageModel, ModelSource, load_model
from heretic_kl.model.padding import left_padded, right_padded
from heretic_kl.model.prefix import PrefixCache, common_prefix, prefix_problem
from heretic_kl.model.proof import prove_sites
from heretic_kl.model.residuals import last_token_residuals

__all__ = [
    "Architecture",
    "ChatEncoder",
    "LanguageModel",
    "ModelSource",
    "PrefixCache",
    "Site",
    "close_thought",
    "common_prefix",
    "edited",
    "find_architecture",
    "last_token_residuals",
    "left_padded",
    "load_model",
    "on_layer_outputs",
    "prefix_problem",
    "prove_sites",
    "right_padded",
    "thought_left_open",
]
