"""A search on weights quantized as they are loaded; what is saved is the original, edited."""

import json
from collections import Counter

import pytest
import torch
from tiny_edits import edited_logits, logits, make_plan

from heretic_kl.cli import main as cli
from heretic_kl.engine import Engine
from heretic_kl.errors import ExportError, ModelError, UnsupportedModelError
from heretic_kl.export import save_lora, save_merged
from heretic_kl.export.lora import read_lora
from heretic_kl.model import ModelSource, edited, load_model
from heretic_kl.model.sites.verification import Residue
from heretic_kl.prompts import DatasetSpec, load_prompts
from heretic_kl.refine.parameters import LearnableEdit
from heretic_kl.search import PlanStore, read_study
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


def test_gradients_of_an_edit_pass_through_quantized_weights(quantized, full):
    """Also after a pass without gradients, in which bitsandbytes may lay weights out anew."""
    gradients = []
    for lm in (quantized, full):
        assert bool(logits(lm.model).isfinite().all())
        edit = LearnableEdit(plan_of(lm))
        with edited(lm.architecture, edit.plan):
            outputs = lm.model(input_ids=torch.arange(3, 12)[None], use_cache=False)
            outputs.logits.float().log_softmax(dim=-1)[..., 5].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in edit.parameters()]).double())
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.8


@pytest.mark.parametrize("quantization", FORMATS)
def test_an_edit_is_searched_learned_saved_and_read_back(
    folder, full, quantization, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    limits = [
        word
        for kind in ("harmful", "harmless")
        for split in ("train", "validation", "test")
        for word in (f"--prompts.{kind}.{split}.limit", "4")
    ]
    lm = load_tiny_model(folder, quantization=quantization)
    prompts = tuple(
        prompt
        for kind in ("harmful", "harmless")
        for split in ("train", "validation")
        for prompt in load_prompts(DatasetSpec(f"builtin:{kind}", split, limit=4))
    )
    texts = [lm.chat.decode(r.tokens) for r in Engine(lm, batch_size=4).responses(prompts, 3)]
    # A tiny model refuses nothing: a word of half of its responses stands for a refusal.
    counts = Counter(word for text in texts for word in {*text.split()})
    marker = min(counts, key=lambda word: (abs(counts[word] - len(texts) / 2), word))
    words = ["--model", str(folder), "--quantization", quantization, "--device", "cpu"]
    words += ["--dtype", "float32", "--trials", "1", "--prompt-set", "builtin", *limits]
    words += ["--max-response-tokens", "3", "--batch-size", "4", "--test-trials", "0"]
    words += [f"--scorers.refusals.settings.markers={json.dumps([marker])}"]
    words += ["--no-directions.by-response"]
    words += ["--scorers.teacher_forced_kl.settings.set_aside_refused=false", "--response-prefix="]
    words += ["--refinement.trials=1", "--refinement.steps=2", "--refinement.kl-tokens=3"]
    assert cli.main(words) == 0, capsys.readouterr().err
    study = read_study(None, tmp_path / "studies")
    record = next(record for record in study.records if record.refinement)
    assert record.refinement.steps == 2
    assert cli.main(["save", "--trial", str(record.number), "--save", "out"]) == 0
    plan = PlanStore(tmp_path / "studies", study.name).load(record.refinement.sha256)
    reloaded = load_tiny_model(tmp_path / "out")
    torch.testing.assert_close(
        logits(reloaded.model), edited_logits(full, plan), rtol=1e-4, atol=1e-4
    )
