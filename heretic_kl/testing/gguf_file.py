"""GGUF files of models of the llama type, to run in llama.cpp. Reads safetensors folders.

llama.cpp's own converter is not part of the package that runs it; this one knows a single type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""Of `transformers`, within a layer where there is one -> of GGUF."""


def write_llama_gguf(
    folder: Path | str, path: Path | str, *, dtype: str = "F16", split: str = "gpt-2"
) -> Path:
    """Write a model of the llama type with a byte-level BPE tokenizer as a GGUF file.

    Args:
        folder: as `transformers` saves it.
        path: where to.
        dtype: of the matrices: F32, F16 or BF16; vectors stay float32.
        split: how llama.cpp splits text before BPE, `tokenizer.ggml.pre`.
    """
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoTokenizer

    folder, path = Path(folder), Path(path)
    config = AutoConfig.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    _write_sizes(writer, config)
    _write_tokenizer(
        writer, AutoTokenizer.from_pretrained(folder), folder, config.vocab_size, split
    )
    kind = getattr(gguf.GGMLQuantizationType, dtype)
    writer.add_file_type(
        getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "F32" else f"MOSTLY_{dtype}")
    )
    tied = config.tie_word_embeddings
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name == "lm_head.weight" and tied:
                continue
            numbers = _permuted(name, tensor.float(), config).numpy()
            stored = numbers if tensor.dim() == 1 else gguf.quants.quantize(numbers, kind)
            writer.add_tensor(
                _gguf_name(name), stored, raw_dtype=None if tensor.dim() == 1 else kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: Any, folder: Path, size: int, split: str) -> None:
    import gguf

    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {entry["id"]: entry for entry in stored["added_tokens"]}
    texts = list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    unused = [f"[PAD{index}]" for index in range(len(texts), size)]
    kinds = [_token_kind(added.get(index)) for index in range(len(texts))]
    merges = [m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(texts + unused)
    writer.add_token_types(kinds + [gguf.TokenType.UNUSED] * len(unused))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _token_kind(added: dict[str, Any] | None) -> int:
    import gguf

    if added is None:
        return int(gguf.TokenType.NORMAL)
    return int(gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED)


def _gguf_name(name: str) -> str:
    if not name.startswith("model.layers."):
        return NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[rest]}"


def _permuted(name: str, weight: Tensor, config: Any) -> Tensor:
    """Rows of queries and keys in llama.cpp's order of rotation: pairs beside each other."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    rows = weight.reshape(count, 2, -1, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape).contiguous()
