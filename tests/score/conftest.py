"""Tiny models, and adapters made of them by PEFT."""

import json
import warnings

import pytest
import torch

from heretic_kl.testing import save_tiny_model, tiny_llama


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "original", tiny_llama())


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "other", tiny_llama(), seed=1)


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    """The original with another tokenizer."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "stranger", tiny_llama())
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"weather"', '"climate"'))
    return folder


@pytest.fixture
def load():
    def loaded(folder):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return loaded


@pytest.fixture
def make_adapter(tmp_path, load):
    """Writes an adapter of a model; `base` is what it says it was made of, None for nothing."""

    def made(model, base=None, name="adapter", kind="lora", safe=True, random=True):
        from peft import LoraConfig, PromptTuningConfig, get_peft_model

        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        if kind == "lora":
            config = LoraConfig(
                r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=not random
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                wrapped = get_peft_model(load(model), config)
            wrapped.save_pretrained(tmp_path / name, safe_serialization=safe)
        file = tmp_path / name / "adapter_config.json"
        stated = json.loads(file.read_text())
        file.write_text(json.dumps({**stated, "base_model_name_or_path": base}))
        return tmp_path / name

    return made
