"""A Hugging Face model seen as layers and sites: loading, architecture, hooks, residuals.

Dimensions: B sequences, T positions, L layers, D residual width, F input width of a site.
"""

from heretic_kl.model.capabilities import Capabilities
from heretic_kl.model.causal_model import CausalModel, evaluating
from heretic_kl.model.forward.candidate_hooks import CandidateRows, edited_by_candidate
from heretic_kl.model.forward.decoding import Decoding
from heretic_kl.model.forward.hooks import edited, on_layer_outputs
from heretic_kl.model.forward.layer_cache import (
    PREFIX,
    WHOLE,
    LayerCache,
    Start,
    spread_boundaries,
)
from heretic_kl.model.forward.layer_inputs import gradient_checkpointing
from heretic_kl.model.forward.packed_weights import (
    packed_bytes,
    packing_weights,
    with_packed_weights,
)
from heretic_kl.model.forward.padding import right_padded
from heretic_kl.model.forward.prefix_cache import PrefixCache, common_prefix, layer_bytes
from heretic_kl.model.forward.probing import find_capabilities
from heretic_kl.model.forward.residuals import last_token_residuals
from heretic_kl.model.forward.token_tree import TokenTree, tree_rectangles
from heretic_kl.model.forward.tree_attention import TreeAttention, run_tree
from heretic_kl.model.language_model import LanguageModel
from heretic_kl.model.loading.adapters import adapter_base, adapter_rank
from heretic_kl.model.loading.adopt import adopt_model
from heretic_kl.model.loading.chat import (
    ChatEncoder,
    close_thought,
    thought_left_open,
    thought_length,
)
from heretic_kl.model.loading.devices import DtypeName, free_memory
from heretic_kl.model.loading.loader import (
    check_to_measure,
    load_model,
    load_to_measure,
    load_tokenizer,
)
from heretic_kl.model.loading.quantization import is_quantized
from heretic_kl.model.loading.sizes import StoredSize, gguf_weights, stored_size
from heretic_kl.model.loading.source import ModelSource
from heretic_kl.model.out_of_memory import clear_device_memory, is_out_of_memory, memory_needed
from heretic_kl.model.sites.architecture import Architecture, Site, find_architecture
from heretic_kl.model.sites.inspection import ModelInspection, SiteGroup, inspect_model
from heretic_kl.model.sites.stack import likely_layers
from heretic_kl.model.sites.verification import verify_sites

__all__ = [
    "Architecture",
    "CandidateRows",
    "Capabilities",
    "CausalModel",
    "ChatEncoder",
    "Decoding",
    "DtypeName",
    "LanguageModel",
    "LayerCache",
    "ModelInspection",
    "ModelSource",
    "PREFIX",
    "PrefixCache",
    "Site",
    "SiteGroup",
    "Start",
    "StoredSize",
    "TokenTree",
    "TreeAttention",
    "WHOLE",
    "adapter_base",
    "adapter_rank",
    "adopt_model",
    "check_to_measure",
    "clear_device_memory",
    "close_thought",
    "common_prefix",
    "edited",
    "edited_by_candidate",
    "evaluating",
    "find_architecture",
    "find_capabilities",
    "free_memory",
    "gguf_weights",
    "gradient_checkpointing",
    "inspect_model",
    "is_out_of_memory",
    "is_quantized",
    "last_token_residuals",
    "layer_bytes",
    "likely_layers",
    "memory_needed",
    "load_model",
    "load_to_measure",
    "load_tokenizer",
    "on_layer_outputs",
    "packed_bytes",
    "packing_weights",
    "right_padded",
    "run_tree",
    "spread_boundaries",
    "stored_size",
    "thought_left_open",
    "thought_length",
    "tree_rectangles",
    "verify_sites",
    "with_packed_weights",
]
