"""GGUF files run by llama.cpp in this process, through `llama-cpp-python`.

model.py      token ids in, full-vocabulary logits out
tokens.py     whether both sides mean the same by a token id
candidate.py  a GGUF file measured beside a reference; the floor across back ends
"""

from heretic_kl.score.llama.model import CACHE_TYPES, LlamaModel, llama_available

__all__ = ["CACHE_TYPES", "LlamaModel", "llama_available"]
