"""Tiny random models and tokenizers for tests. Imported by no other room.

Built from a config and a seed, without downloads, in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from heretic_kl.model import LanguageModel, ModelSource, load_model

WIDTH = 32
"""D of every tiny model."""
LAYERS = 3
WORDS = (
    "how do I make a cake bomb please tell me about the weather in Rome sorry cannot help sure "
    "here is what you need to know first mix flour with water and then wait I will not"
).split()
SPECIAL_TOKENS = ("<unk>", "<pad>", "<|start|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|> {{ message['role'] }} {{ message['content'] }} <|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|start|> assistant {% endif %}"
)


def tiny_tokenizer() -> Any:
    """A word-level tokenizer with a chat template; unknown words become `<unk>`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys([*SPECIAL_TOKENS, "user", "assistant", "system", *WORDS])
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_llama(**changes: Any) -> Any:
    """A config of `LAYERS` layers, `WIDTH` wide; `attention_bias=True` gives its sites biases."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**_common(), **changes})


def tiny_qwen2(**changes: Any) -> Any:
    """Biases on queries, keys and values, none on the sites; tied embeddings."""
    from transformers import Qwen2Config

    return Qwen2Config(**{**_common(), "tie_word_embeddings": True, **changes})


def tiny_gemma2(**changes: Any) -> Any:
    """Norms between sites and residual stream, soft-capped logits, tied embeddings."""
    from transformers import Gemma2Config

    return Gemma2Config(**{**_common(), "head_dim": 8, "tie_word_embeddings": True, **changes})


def tiny_gpt2(**changes: Any) -> Any:
    """Conv1D sites, which store their weights transposed, all with biases; tied embeddings."""
    from transformers import GPT2Config

    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_inner": 48, "n_positions": 128}
    shared = {key: value for key, value in _common().items() if key not in _LLAMA_SIZES}
    return GPT2Config(**{**shared, **sizes, **changes})


TINY_CONFIGS: Mapping[str, Callable[..., Any]] = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "gemma2": tiny_gemma2,
    "gpt2": tiny_gpt2,
}
"""Builders of tiny configs by family."""

_LLAMA_SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _common() -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    return {
        **_LLAMA_SIZES,
        "vocab_size": len(tokenizer),
        # Large enough for logits that differ between tokens.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def save_tiny_model(
    folder: Path | str,
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    seed: int = 0,
) -> Path:
    """Write a random model and the tiny tokenizer as `transformers` writes them.

    Biases and gains, which start at 0 and 1, are made random too, so that a wrong one shows.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Callable[[Any], nn.Module] = AutoModelForCausalLM.from_config
        model = build(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def save_tiny_classifier(folder: Path | str, *, labels: int | Sequence[str], seed: int = 0) -> Path:
    """Write a random text classifier with as many labels, or with these, and the tokenizer."""
    from transformers import AutoModelForSequenceClassification

    names = [f"LABEL_{n}" for n in range(labels)] if isinstance(labels, int) else labels
    id2label = dict(enumerate(names))
    config = tiny_llama(id2label=id2label, label2id={name: n for n, name in id2label.items()})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build: Callable[[Any], Any] = AutoModelForSequenceClassification.from_config
        build(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def load_tiny_model(folder: Path | str, **options: Any) -> LanguageModel:
    """Load it in float32 on the CPU; see `heretic_kl.model.load_model` for options."""
    return load_model(ModelSource(str(folder)), **{"dtype": "float32", "device": "cpu", **options})
