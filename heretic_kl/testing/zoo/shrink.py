"""The rule that makes any config tiny, by the names of its settings. Knows no model type.

Sizes are pairwise different wherever a family permits, so that a mistaken axis shows as a wrong
shape and not as a wrong number. Lists with one entry a layer are thinned so that every *kind* of
layer stays; see `chosen_layers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

VOCABULARY = 100
"""Rows of every embedding: more than a small tokenizer needs, as real models pad theirs."""
UNKNOWN, PAD, BEGIN, END = 0, 1, 2, 3
"""Special ids, as tiny tokenizers number them."""
LAYERS = 4

DENSE, EXPERT, SHARED = 48, 40, 56
"""Widths of feed-forward blocks: of dense layers, of one expert, of the experts all tokens use."""

WIDTHS = (
    "hidden_size n_embd d_model emb_dim embedding_dim word_embed_proj_dim embedding_size "
    "input_embedding_size output_embedding_size lru_width attention_hidden_size ple_embed_dim "
    "backbone_hidden_size text_hidden_size output_dim adapter_in_dim adapter_out_dim "
    "adapter_input_size ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels"
).split()
"""Settings that are the width of the residual stream, or that families tie to it."""

SIZES: Mapping[str, Any] = {
    # feed-forward
    "intermediate_size": DENSE,
    "ffn_dim": DENSE,
    "encoder_ffn_dim": DENSE,
    "decoder_ffn_dim": DENSE,
    "n_inner": DENSE,
    "dff": DENSE,
    "dim_ff": DENSE,
    "d_inner": DENSE,
    "ffn_hidden_size": DENSE,
    "feed_forward_size": DENSE,
    "intermediate_size_mlp": DENSE,
    "dense_intermediate_size": DENSE,
    "prefix_dense_intermediate_size": DENSE,
    "moe_intermediate_size": EXPERT,
    "expert_ffn_hidden_size": EXPERT,
    "shared_expert_intermediate_size": SHARED,
    "shared_experts_intermediate_size": SHARED,
    "moe_shared_expert_intermediate_size": SHARED,
    "shared_intermediate_size": SHARED,
    # heads
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "num_query_groups": 2,
    "head_dim": 24,
    "swa_head_dim": 24,
    "global_head_dim": 32,
    "kv_channels": 24,
    "dim_head": 24,
    "d_head": 24,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 24,
    # latent attention
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 24,
    "o_lora_rank": 18,
    "o_groups": 2,
    "index_head_dim": 16,
    "index_n_heads": 8,  # with few, scores that tie at 0 make the choice of keys a matter of shape
    "index_topk": 6,
    # experts
    "num_experts": 6,
    "num_local_experts": 6,
    "n_routed_experts": 6,
    "moe_num_experts": 6,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 2,
    "router_hidden_size": 20,
    # recurrences
    "state_size": 10,
    "ssm_state_size": 10,
    "mamba_d_state": 10,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_headdim": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 8,
    "mamba_n_groups": 2,
    "mamba_ngroups": 2,
    "n_groups": 2,
    "mamba_dt_rank": 5,
    "time_step_rank": 5,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_num_heads": 4,
    "linear_head_dim": 20,
    # windows and lengths
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_window_size": 8,
    "window_size": 8,
    "local_attention": 8,
    "attention_chunk_size": 8,
    "block_size": 8,
    "n_positions": 128,
    "n_ctx": 128,
    "context_length": 128,
    "max_seq_len": 128,
    "max_target_positions": 128,
    "max_source_positions": 16,
    # vocabularies
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 12,
    # towers for images and sound, which text never enters
    "image_size": 16,
    "patch_size": 8,
    "num_mel_bins": 8,
    "num_codebooks": 2,
    "depth": 2,
    "mlp_dim": DENSE,
    "output_channels": 16,
    "mm_tokens_per_image": 4,
}
"""Setting -> its tiny value. Settings that are `None` by default stay so, unless in `WHEN_NONE`."""

WHEN_NONE = (
    "head_dim n_inner num_key_value_heads moe_intermediate_size lru_width n_routed_experts "
    "num_experts_per_tok"
).split()
"""Settings set even where the default is `None`: derived sizes hide mistakes, or None fails."""

DEPTHS = (
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks "
    "num_encoder_layers num_decoder_layers"
).split()
"""Settings that count layers."""

SPECIAL_IDS = {
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "unk_token_id": UNKNOWN,
    "decoder_start_token_id": BEGIN,
    "start_token_id": BEGIN,
    "sep_token_id": END,
    "eod_token_id": END,
    "forced_eos_token_id": END,
}

INITIAL = {"initializer_range": 0.15, "init_std": 0.15, "initializer_factor": 0.15}
"""Large enough for logits that differ between tokens and between prompts."""


def tiny_settings(
    defaults: Mapping[str, Any],  # every setting of a config, as its class leaves it
    *,
    layers: int,
    width: int,
    vocabulary: int,
) -> dict[str, Any]:
    """Settings to pass to the config's class; those it does not list keep their defaults."""
    depth = next((defaults[name] for name in DEPTHS if isinstance(defaults.get(name), int)), None)
    indices = chosen_layers(layer_lists(defaults, depth), depth=depth, layers=layers)
    settings: dict[str, Any] = {}
    for name, default in defaults.items():
        value = _tiny(
            name,
            default,
            indices=indices,
            depth=depth,
            width=width,
            vocabulary=vocabulary,
        )
        if value is not None:
            settings[name] = value
    if "qk_rope_head_dim" in settings:  # latent attention: no grouped heads, a derived head size
        settings.pop("head_dim", None)
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return settings


def layer_lists(defaults: Mapping[str, Any], depth: int | None) -> dict[str, Sequence[Any]]:
    """Settings with one entry a layer."""
    return {
        name: value
        for name, value in defaults.items()
        if isinstance(value, list | tuple) and len(value) == depth and depth > 2
    }


def chosen_layers(
    lists: Mapping[str, Sequence[Any]], *, depth: int | None, layers: int
) -> list[int]:
    """Which of the family's layers the tiny model keeps, in order.

    The first layer of every kind (a kind: one combination of entries across the lists), the last
    layer (some families demand that it attends to everything), then the second of every kind and
    so on until there are `layers`. More than `layers` where there are more kinds.
    """
    if depth is None or not lists:
        return list(range(layers))
    seen: dict[str, int] = {}
    rounds = []
    for index in range(depth):
        kind = repr([entries[index] for entries in lists.values()])
        rounds.append((seen.get(kind, 0), index))
        seen[kind] = seen.get(kind, 0) + 1
    first = [index for time, index in rounds if time == 0]
    if rounds[-1][1] not in first:
        first.append(rounds[-1][1])
    rest = [index for _, index in sorted(rounds) if index not in first]
    return sorted([*first, *rest[: max(0, layers - len(first))]])


def _tiny(
    name: str,
    default: Any,
    *,
    indices: list[int],
    depth: int | None,
    width: int,
    vocabulary: int,
) -> Any:
    """The tiny value of one setting, or None where its default stays."""
    if isinstance(default, list | tuple) and len(default) == depth and depth > 2:
        return [_tiny_entry(name, default[index]) for index in indices]
    if name in SPECIAL_IDS:
        return SPECIAL_IDS[name]
    if name.endswith(("_token_id", "_token_index")) and isinstance(default, int):
        # Ids that stand for images and sound: at the end, where no text tokenizer reaches.
        return vocabulary - 1 - sum(map(ord, name)) % 16
    if name in INITIAL:
        return INITIAL[name]
    if default is None and name not in WHEN_NONE:
        return None
    if name in DEPTHS:
        return len(indices)
    if name in WIDTHS:
        return width
    if name in ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"):
        return vocabulary
    if name == "max_position_embeddings":
        return 128
    return SIZES.get(name)


def _tiny_entry(name: str, entry: Any) -> Any:
    return SIZES.get(name, entry) if isinstance(entry, int) and entry > 1 else entry
