"""For tests, ours and those of plug-in authors.

tiny.py             tiny random models of four families, and a tokenizer
zoo/                a tiny random model of every model type
fakes.py            an engine without a model, and a scorer's context
scorer_contract.py  the laws of a scorer, as a test class to inherit
"""

from heretic_kl.testing.fakes import (
    FAKE_PROMPTS,
    FakeEngine,
    fake_context,
    fake_plan,
    fake_response,
)
from heretic_kl.testing.scorer_contract import ScorerContract
from heretic_kl.testing.tiny import (
    CHAT_TEMPLATE,
    LAYERS,
    SPECIAL_TOKENS,
    TINY_CONFIGS,
    WIDTH,
    WORDS,
    load_tiny_model,
    save_tiny_classifier,
    save_tiny_model,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
    tiny_tokenizer,
)

__all__ = [
    "CHAT_TEMPLATE",
    "FAKE_PROMPTS",
    "FakeEngine",
    "LAYERS",
    "SPECIAL_TOKENS",
    "ScorerContract",
    "TINY_CONFIGS",
    "WIDTH",
    "WORDS",
    "fake_context",
    "fake_plan",
    "fake_response",
    "load_tiny_model",
    "save_tiny_classifier",
    "save_tiny_model",
    "tiny_gemma2",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_qwen2",
    "tiny_tokenizer",
]
