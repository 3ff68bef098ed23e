"""What the installed transformers does not let a tiny decoder do, and why. Data only.

`tests/testing/test_zoo.py` checks every entry, so an entry that a later release mends shows.
"""

from __future__ import annotations

from collections.abc import Mapping

NEEDS_LIBRARY: Mapping[str, str] = {
    "gemma3n": "timm",  # its vision tower
}
"""Model type -> a library without which its class cannot be built at all."""

NOT_RELOADED: Mapping[str, str] = {
    "emu3": "saves the config of its text half, `emu3_text_model`, which has no auto class",
    "mllama": "saves the config of its text half, `mllama_text_model`, which has no auto class",
}
"""Model type -> why `AutoModelForCausalLM` cannot load what its model saved; its class can."""

OWN_CACHE: Mapping[str, str] = {
    "dory": "its bias of positions has the length of the new tokens, not of the keys",
    "minimax": "its own class of cache, rejects a `DynamicCache`",
    "openai-gpt": "none",
    "rwkv": "`state`",
    "xlstm": "its own class of cache",
}
"""Decoder -> its replacement for a `DynamicCache`, or why one does not work."""

FULL_PRECISION_ONLY: Mapping[str, str] = {
    "xlstm": "multiplies its float32 state with weights as they are stored",
}
"""Decoder -> why its forward pass fails in half precision on a CPU."""
