"""GGUF files run by llama.cpp in this process, through `llama-cpp-python`.

model.py        token ids in, full-vocabulary logits out
tokens.py       whether both sides mean the same by a token id
candidate.py    a GGUF file measured beside a reference; the floor across back ends
reference.py    a GGUF file as the reference, in step with its candidates
base_logits.py  llama.cpp's file of base logits
kld_rows.py     the figures that its own program prints
"""

from heretic_kl.score.llama.model import CACHE_TYPES, LlamaModel, llama_available

__all__ = ["CACHE_TYPES", "LlamaModel", "llama_available"]
