"""A search on weights quantized as they are loaded; what is saved is the original, edited."""

import pytest
import torch
from tiny_edits import edited_logits, logits, make_plan

from heretic_kl.cli import main as cli
from heretic_kl.errors import ExportError, ModelError, UnsupportedModelError
from heretic_kl.export import save_lora, save_merged
from heretic_kl.export.lora import read_lora
from heretic_kl.model import ModelSource, edited, load_model
from heretic_kl.model.sites.verification import Residue
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FORMATS = ["bnb_4bit", "bnb_8bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16, attention_bias=True)
    return save_tiny_model(tmp_path_factory.mktemp("source") / "m", config)


@pytest.fixture(scope="module", params=FORMATS)
def quantized(request, folder):
    return load_tiny_model(folder, quantization=request.param)


@pytest.fixture(scope="module")
def full(folder):
    return load_tiny_model(folder)


def plan_of(lm):
    return make_plan(lm, width=64)


def test_the_same_sites_are_found_and_proved(quantized, full):
    assert [s.key for s in quantized.architecture.sites] == [s.key for s in full.architecture.sites]
    assert float(Residue(quantized).by_layer().max()) < 1e-2
    assert not torch.equal(logits(quantized.model), logits(full.model))


def test_a_measured_weight_is_the_original_up_to_quantization(quantized, full):
    limit = 0.15 if quantized.quantization == "bnb_4bit" else 0.02
    for ours, original in zip(quantized.architecture.sites, full.architecture.sites, strict=True):
        error = (ours.weight() - original.weight()).norm() / original.weight().norm()
        assert 0 < float(error) < limit


def test_saving_writes_the_full_precision_original_edited(quantized, full, tmp_path):
    plan = plan_of(quantized)
    saved = save_merged(quantized, plan, tmp_path / "out")
    assert saved.route == "streamed"
    reloaded = load_tiny_model(tmp_path / "out")
    torch.testing.assert_close(
        logits(reloaded.model), edited_logits(full, plan), rtol=1e-4, atol=1e-4
    )


def test_an_adapter_is_saved(quantized, tmp_path):
    saved = save_lora(quantized, plan_of(quantized), tmp_path / "out")
    assert saved.exact
    factors = read_lora(tmp_path / "out")
    assert set(factors) == {site.key.path for site in quantized.architecture.sites}


def test_norm_modes_are_refused(quantized):
    with pytest.raises(UnsupportedModelError, match=r"only edit.norm none .* is quantized"):
        quantized.architecture.editable(("attention",), restore_norms=True)


def test_a_checkpoint_that_is_quantized_already(quantized, tmp_path):
    quantized.model.save_pretrained(tmp_path / "q")
    quantized.chat.tokenizer.save_pretrained(tmp_path / "q")
    stored = load_model(ModelSource(str(tmp_path / "q")), dtype="float32", device="cpu")
    plan = plan_of(stored)
    with edited(stored.architecture, plan):
        assert bool(torch.isfinite(logits(stored.model)).all())
    with pytest.raises(ExportError, match="quantized, and an edit cannot be written into"):
        save_merged(stored, plan, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="quantized already: leave out --quantization"):
        load_tiny_model(tmp_path / "q", quantization="bnb_4bit")


def test_a_missing_library_is_one_line(folder, monkeypatch):
    monkeypatch.setattr("heretic_kl.model.loading.quantization.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs bitsandbytes: pip install"):
        load_tiny_model(folder, quantization="bnb_4bit")


def test_a_whole_run(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    limits = [
        word
        for kind in ("harmful", "harmless")
        for split in ("train", "validation", "test")
        for word in (f"--prompts.{kind}.{split}.limit", "2")
    ]
    words = ["--model", str(folder), "--quantization", "bnb_4bit", "--device", "cpu"]
    words += ["--dtype", "float32", "--trials", "1", "--prompt-set", "builtin", *limits]
    words += ["--max-response-tokens", "3", "--batch-size", "4", "--pick", "knee", "--save", "out"]
    words += ["--no-refine", "--no-directions.by-response"]  # a tiny model refuses nothing
    assert cli.main(words) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()
