"""Models, adapters and stored references that are damaged, of another kind or not there.

What is wrong with a model is found on loading it at last, with a reference before that.
"""

import json
import shutil
import struct

import torch

from heretic_kl.kl import Head, Reference, ReferenceIdentity, vocabulary_hash
from heretic_kl.testing import tiny_tokenizer
from wrong_inputs.case import BASE, Wrong

WEIGHTS = "bad/model.safetensors"


def copied(path):
    """The folder `bad`, a copy of the tiny model; its weights as bytes."""
    shutil.copytree("model", path.parent, dirs_exist_ok=True)
    return path.read_bytes() if path.exists() else b""


def cut(path):
    path.write_bytes(copied(path)[:-100])


def reshaped(path):
    """A tensor whose sizes are swapped: as many values, in another shape."""
    data = copied(path)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith("down_proj.weight"))
    header[name]["shape"].reverse()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def pickled(path):
    copied(path)
    path.rename(path.with_name("pytorch_model.bin"))


def with_text(text):
    """One file of the model, replaced."""

    def write(path):
        copied(path)
        path.write_text(text)

    return write


def linked(path):
    copied(path)
    path.symlink_to("/etc/hostname")


def adapter_weights(path):
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def reference(token=2, factor=1, **changes):
    """A stored reference of one position and three tokens, with another token, head or setting."""
    facts = {
        "dtype": "float32",
        "divergence": "forward_kl",
        "temperature": 1.0,
        "responses": "greedy",
    }
    facts |= {
        "position_decay": 1.0,
        "batch_size": 1,
        "share_prefix": True,
        "prompts": "",
        **changes,
    }

    def write(path):
        head, ids = Head(torch.ones(3, 4)), torch.tensor([[token]])
        tokenizer = vocabulary_hash(tiny_tokenizer().get_vocab())
        identity = ReferenceIdentity(tokenizer, 3, head.fingerprint(), facts)
        mask, states = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 4)
        whole = Reference.from_hidden(ids, mask, states, identity, prompts=ids.clamp(max=2))
        whole.save(path, Head(factor * head.weight).columns())

    return write


def stored(what, line, content):
    """A measurement from a bad file."""
    words = ("score", "-r", "r.safetensors", "--candidate", "model")
    return Wrong(what, words, f"r.safetensors {line}", 1, files={"r.safetensors": content})


def model(what, line, files, name="bad"):
    """A run on a bad model."""
    return Wrong(what, ("--model", name, *BASE), line, 1, files=files)


ADAPTER = {"bad/adapter_model.safetensors": adapter_weights}
CASES = [
    model(
        "weights cut off",
        "'bad/model.safetensors' is no safetensors file, or is cut off: its header claims a tensor that ends at byte [...]; download it again",
        {WEIGHTS: cut},
    ),
    model(
        "weights of another shape",
        "cannot load the model of 'bad': a tensor of its files has another shape than its config.json says: download it again",
        {WEIGHTS: reshaped},
    ),
    model(
        "weights as pickles",
        "'bad' has no safetensors weights; pickled weights are not read because they can run code: convert them first",
        {WEIGHTS: pickled},
    ),
    model(
        "index that names a file elsewhere",
        "'bad': '../x.safetensors', which config.json names, is not a file in the model's folder",
        {"bad/config.json": with_text('{"transformers_weights": "../x.safetensors"}')},
    ),
    model(
        "link in a model's folder that leads out of it",
        "'bad/notes.txt' is a link that leads out of the model's folder: put the file itself there",
        {"bad/notes.txt": linked},
    ),
    model(
        "config of a model that is no JSON",
        "cannot load the tokenizer of 'bad': [...]",
        {"bad/config.json": with_text("{")},
    ),
    model(
        "model of an unknown type",
        "cannot load the model of 'bad': The checkpoint you are trying to load has model type `nothing` [...]",
        {"bad/config.json": with_text('{"model_type": "nothing"}')},
    ),
    model(
        "GGUF file that is none",
        "'none.gguf' is no GGUF file, or is cut off: its header claims [...]; download it again",
        {"none.gguf": "no weights at all"},
        "none.gguf",
    ),
    model(
        "adapter that names no base",
        "'bad' is an adapter and names no base model: give the model to put it on (--base)",
        {"bad/adapter_config.json": '{"peft_type": "LORA"}', **ADAPTER},
    ),
    model(
        "adapter whose base is not there",
        "no model at './gone': give a folder, a .gguf file or a hub id",
        {
            "bad/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "./gone"}',
            **ADAPTER,
        },
    ),
    model(
        "adapter that is pickled",
        "adapter 'bad' has no adapter_model.safetensors; pickled weights are not read because they can run code: convert them first",
        {"bad/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "model"}'},
    ),
    model(
        "adapter of soft prompts",
        "adapter 'bad' is of kind PROMPT_TUNING, which puts learned tokens before the prompt; only adapters inside the layers (such as LoRA) can be measured",
        {
            "bad/adapter_config.json": '{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "model"}'
        },
    ),
    model(
        "adapter that names a module of Python",
        "adapter 'bad' names a module of Python (megatron_core) to be imported, which no file may",
        {
            "bad/adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "model", "megatron_config": {"a": 1}}',
            **ADAPTER,
        },
    ),
    model(
        "adapter whose config is no JSON",
        "cannot read 'bad/adapter_config.json': [...]",
        {"bad/adapter_config.json": "{", **ADAPTER},
    ),
    stored(
        "stored reference that is cut off",
        "cannot be read: [...]",
        "no tensors at all",
    ),
    stored(
        "stored reference with a token that no model has",
        "is damaged: token ids must be 0 or more, and below 3, the vocabulary's size; store it anew",
        reference(token=3),
    ),
    stored(
        "stored reference with another head",
        "is damaged: its head is not the one that its hidden states are for; store it anew",
        reference(factor=2),
    ),
    stored(
        "stored reference without a whole batch",
        "is damaged: batch_size: Input should be greater than or equal to 1, got 0; store it anew",
        reference(batch_size=0),
    ),
]
