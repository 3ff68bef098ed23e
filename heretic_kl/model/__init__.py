"""A Hugging Face model seen as layers and sites: loading, architecture, hooks, residuals.

Dimensions: B sequences, T positions, L layers, D residual width, F input width of a site.
"""

from heretic_kl.model.causal_model import CausalModel, adopt_model, evaluating, unwrapped
from heretic_kl.model.forward.candidate_hooks import CandidateRows, edited_by_candidate
from heretic_kl.model.forward.hooks import edited, on_layer_outputs
from heretic_kl.model.forward.layer_inputs import layer_inputs, resumed_at, returns_tuple
from heretic_kl.model.forward.packed_weights import (
    packed_bytes,
    with_packed_weights,
    with_plain_weights,
)
from heretic_kl.model.forward.padding import left_padded, right_padded
from heretic_kl.model.forward.prefix_cache import (
    PrefixCache,
    cache_argument,
    common_prefix,
    copied_layer,
    has_places,
    inexact,
    new_cache,
    prefix_problem,
    shortest_window,
)
from heretic_kl.model.forward.residuals import last_token_residuals
from heretic_kl.model.forward.tree_attention import TreeAttention, TreeRectangle, attending
from heretic_kl.model.language_model import LanguageModel
from heretic_kl.model.loading.adapters import adapter_base
from heretic_kl.model.loading.chat import ChatEncoder, close_thought, thought_left_open
from heretic_kl.model.loading.devices import DtypeName
from heretic_kl.model.loading.loader import (
    check_to_measure,
    load_model,
    load_to_measure,
    load_tokenizer,
)
from heretic_kl.model.loading.source import ModelSource
from heretic_kl.model.sites.architecture import Architecture, Site, find_architecture
from heretic_kl.model.sites.inspection import ModelInspection, SiteGroup, inspect_model
from heretic_kl.model.sites.probe import probe_tokens
from heretic_kl.model.sites.stack import likely_layers
from heretic_kl.model.sites.verification import verify_sites

__all__ = [
    "Architecture",
    "CausalModel",
    "ChatEncoder",
    "DtypeName",
    "CandidateRows",
    "LanguageModel",
    "ModelInspection",
    "ModelSource",
    "PrefixCache",
    "Site",
    "SiteGroup",
    "TreeAttention",
    "TreeRectangle",
    "adapter_base",
    "adopt_model",
    "attending",
    "cache_argument",
    "check_to_measure",
    "close_thought",
    "common_prefix",
    "copied_layer",
    "edited",
    "edited_by_candidate",
    "evaluating",
    "find_architecture",
    "has_places",
    "inexact",
    "inspect_model",
    "last_token_residuals",
    "layer_inputs",
    "left_padded",
    "likely_layers",
    "load_model",
    "load_to_measure",
    "load_tokenizer",
    "on_layer_outputs",
    "new_cache",
    "packed_bytes",
    "prefix_problem",
    "probe_tokens",
    "verify_sites",
    "resumed_at",
    "returns_tuple",
    "right_padded",
    "shortest_window",
    "thought_left_open",
    "unwrapped",
    "with_packed_weights",
    "with_plain_weights",
]
