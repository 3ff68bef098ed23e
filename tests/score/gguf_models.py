"""A tiny model in the forms that llama.cpp and transformers read, and a reference of it."""

import ctypes

from heretic_kl.score import TeacherForcedKL
from heretic_kl.score.llama import model
from heretic_kl.testing import CHAT_TEMPLATE, WORDS, save_tiny_model, tiny_llama
from heretic_kl.testing.gguf_file import write_llama_gguf

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake"]
Q8_0, Q4_0 = 7, 2


def bpe_tokenizer():
    """A byte-level BPE tokenizer, the kind that GGUF files hold."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def make_original(folder):
    """A model as safetensors, whose tokenizer a GGUF file can hold."""
    tokenizer = bpe_tokenizer()
    config = tiny_llama(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    save_tiny_model(folder / "original", config)
    tokenizer.save_pretrained(folder / "original")


def make_models(folder):
    """A model as safetensors, as F32, Q8_0 and Q4_0 GGUF files."""
    import llama_cpp as library

    make_original(folder)
    write_llama_gguf(folder / "original", folder / "f32.gguf", dtype="F32")
    for name, kind in (("q8_0", Q8_0), ("q4_0", Q4_0)):
        options = library.llama_model_quantize_default_params()
        options.nthread, options.ftype, options.pure = 1, kind, True
        model._library()  # keeps its log from stderr
        source, target = folder / "f32.gguf", folder / f"{name}.gguf"
        code = library.llama_model_quantize(
            str(source).encode(), str(target).encode(), ctypes.byref(options)
        )
        assert code == 0
    return folder


def built(models, reference=None, **options):
    fixed = {"prompts": PROMPTS, "kl_tokens": 4, "dtype": "float32", "gguf_cache_type": "f32"}
    return TeacherForcedKL(reference or models / "original", **{**fixed, **options})
