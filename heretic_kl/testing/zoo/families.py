"""What the general rule of `shrink.py` gets wrong about single model types, as a table.

Data only. Most entries make a tiny model mix the kinds of layers that its family can mix: their
default configs name one kind, or have a period longer than a tiny model is deep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEAVE: Any = object()
"""As a value: this setting keeps what its class makes of the others."""

_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_ONE_DENSE = {"mlp_only_layers": [1]}
_DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse", "dense"]}
_LLAMA4 = {"interleave_moe_layer_step": 2, "moe_layers": [1, 3], "no_rope_layers": [1, 0, 1, 0]}
_GEMMA4_EXPERTS = {
    "global_head_dim": 32,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
_GEMMA4_SHARED_CACHE = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "global_head_dim": 32,
}
_SLIDING_LATENT = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 20,
    "swa_kv_lora_rank": 28,
    "swa_head_dim": 28,
    "swa_qk_nope_head_dim": 20,
    "swa_v_head_dim": 12,
    "head_dim": 32,
}

OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_hash_byte_group_size": [3, 4],
    },
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "cohere2_moe": {"logit_scale": 0.5, **_DENSE_AND_SPARSE},
    "cohere_compass_text": {
        **_SLIDING_AND_FULL,
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
            "full_attention": None,  # no positions at all
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 32,
        "qk_rope_head_dim": LEAVE,
        "partial_rotary_factor": 0.25,
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
    },
    "dots1": {**_SLIDING_AND_FULL, "n_shared_experts": 1},
    "dots3_note_text": _SLIDING_LATENT,
    "emu3": {
        "vocabulary_map": {"<image>": 90, "<|visual token 000001|>": 91},
        "vq_config": {
            "codebook_size": 16,
            "embed_dim": 4,
            "latent_channels": 4,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
        "intermediate_size": 48,
        "laurel_rank": 18,
    },
    "gemma4": {"text_config": _GEMMA4_EXPERTS},
    "gemma4_text": _GEMMA4_SHARED_CACHE,
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": LEAVE},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "helium": {"head_dim": 16},
    "hrm_text": {"num_hidden_layers": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "inkling_text": {"logits_mup_width_multiplier": 2.0, **_DENSE_AND_SPARSE},
    "jamba": {
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "laguna": {
        **_SLIDING_AND_FULL,
        "num_attention_heads_per_layer": [4, 6, 4, 6],
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "full_attn_idxs": LEAVE,
        "block_multiple_of": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "llama4_text": _LLAMA4,
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "mellum": {**_SLIDING_AND_FULL, **_DENSE_AND_SPARSE},
    "mimo_v2_flash": {"v_head_dim": 20},
    "minimax_m3_vl_text": {
        **_DENSE_AND_SPARSE,
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "intermediate_size": 40,  # of one expert
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral": _SLIDING_AND_FULL,
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "nemotron_h": {
        "layers_block_type": [
            "linear_attention",
            "moe",
            "full_attention",
            "mlp",
            "linear_attention",
            "full_attention",
        ]
    },
    "qwen2_moe": _ONE_DENSE,
    "qwen3_moe": _ONE_DENSE,
    "qwen3_next": _ONE_DENSE,
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 12,
        "ple_layer_ids": [1],
        "ple_embed_dim": 64,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
        "heads_per_ngram": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [24, 40],
        "attention_head_size": 24,
        "attn_layers": ["local", "lsh", "local", "lsh"],
    },
    "roc_bert": {
        "pronunciation_embed_dim": 12,
        "pronunciation_vocab_size": 20,
        "shape_embed_dim": 14,
        "shape_vocab_size": 30,
    },
    "xlnet": {"d_head": 16},
    "xlstm": {"qk_dim_factor": 1.0},  # its cache rounds half the width up to a multiple of 64
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": LEAVE,
        "num_key_value_heads": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": LEAVE,
        "num_key_value_heads": 4,
        "num_mem_blocks": 2,
        "use_shared_attention_adapter": True,
        "use_mem_rope": True,
        "adapter_rank": 12,
    },
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"] * 2,
        "sliding_window": 8,
    },
}
"""Model type (of the nested config, where configs nest) -> settings.

Lists of `LAYERS` entries are patterns, repeated for deeper models, unless an entry has a depth of
its own. A mapping under the name of a nested config holds settings of that config.
"""

UNDECLARED_HEAD_SIZE = (
    "apertus bamba cohere doge dots1 ernie4_5_moe exaone4 exaone_moe falcon_h1 flex_olmo glm4_moe "
    "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared jamba lfm2 "
    "lfm2_moe nanochat olmo olmo2 olmo3 olmo_hybrid phi phi3 phi4_multimodal phimoe qwen2 "
    "qwen2_moe qwen3_moe smollm3 starcoder2"
).split()
"""Model types that obey a `head_dim` in `config.json` although their config class declares none.

Released models use it, Qwen3-30B-A3B for one: its heads together are wider than its residual
stream.
"""
