"""A PEFT adapter on its base as the model that is edited."""

import warnings

import pytest
import torch
from tiny_edits import edited_logits, logits, make_plan

from heretic_kl.cli import main as cli
from heretic_kl.errors import ExportError, ModelError, UnsupportedModelError
from heretic_kl.export import save_lora, save_merged
from heretic_kl.model import ModelSource
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama


@pytest.fixture
def base(tmp_path):
    return save_tiny_model(tmp_path / "base", tiny_llama())


@pytest.fixture
def adapter(tmp_path, base):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_adapter_is_in_the_model_that_is_edited_and_saved(base, adapter, tmp_path):
    lm, plain = load_tiny_model(adapter), load_tiny_model(base)
    assert not torch.allclose(logits(lm.model), logits(plain.model))
    assert [s.key for s in lm.architecture.sites] == [s.key for s in plain.architecture.sites]
    plan = make_plan(lm)
    saved = save_merged(lm, plan, tmp_path / "out")
    assert saved.route == "rewritten"
    reloaded = load_tiny_model(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded.model), edited_logits(lm, plan))


def test_an_adapter_of_an_adapter_is_refused(adapter, tmp_path):
    lm = load_tiny_model(adapter)
    with pytest.raises(ExportError, match="cannot be put on another"):
        save_lora(lm, make_plan(lm), tmp_path / "out")


def test_the_base_that_is_given_wins(adapter, tmp_path):
    other = save_tiny_model(tmp_path / "other", tiny_llama(), seed=1)
    named = load_tiny_model(adapter)
    loaded = load_tiny_model(adapter, base=ModelSource(str(other)))
    assert not torch.allclose(logits(named.model), logits(loaded.model))


def test_mistakes(adapter, base, tmp_path):
    with pytest.raises(UnsupportedModelError, match="leave out --quantization"):
        load_tiny_model(adapter, quantization="bnb_4bit")
    with pytest.raises(ModelError, match="is an adapter itself"):
        load_tiny_model(adapter, base=ModelSource(str(adapter)))
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(ModelError, match="no model at"):
        load_tiny_model(adapter)


def test_inspected(adapter, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", str(adapter)]) == 0
    assert "self_attn.o_proj" in capsys.readouterr().out
