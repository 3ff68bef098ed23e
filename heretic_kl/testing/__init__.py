"""For tests, ours and plug-in authors': tiny random models, and one of every model type (`zoo`)."""

from heretic_kl.testing.tiny import (
    CHAT_TEMPLATE,
    LAYERS,
    SPECIAL_TOKENS,
    TINY_CONFIGS,
    WIDTH,
    WORDS,
    load_tiny_model,
    save_tiny_model,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    tiny_tokenizer,
)

__all__ = [
    "CHAT_TEMPLATE",
    "LAYERS",
    "SPECIAL_TOKENS",
    "TINY_CONFIGS",
    "WIDTH",
    "WORDS",
    "load_tiny_model",
    "save_tiny_model",
    "tiny_gemma2",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_qwen2",
    "tiny_tokenizer",
]
