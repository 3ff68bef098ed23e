"""A study is tied to all that its trials depend on: every weight, the config, scorers' code."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import heretic_kl
from heretic_kl.model import ModelSource, load_model
from heretic_kl.run.setup.fingerprint import (
    config_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from heretic_kl.scoring.loader import scorer_folder
from heretic_kl.scoring.sources import source_digest, source_files
from heretic_kl.testing import save_tiny_model, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", tiny_llama())


@pytest.fixture(scope="module")
def lm(folder):
    return load_model(ModelSource(str(folder)), dtype="float32", device="cpu")


@pytest.mark.parametrize(
    "part",
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "norm", "embed_tokens"],
)
def test_one_changed_number_in_any_weight_makes_another_model(lm, part):
    before = weights_fingerprint(lm)
    name = [name for name, _ in lm.model.named_parameters() if f"{part}.weight" in name][-1]
    weight = lm.model.get_parameter(name)
    last = weight.detach().reshape(-1)[-1:]
    value = last.clone()
    last += 1.0
    assert weights_fingerprint(lm) != before
    last.copy_(value)
    assert weights_fingerprint(lm) == before


def test_the_dtype_and_shape_of_a_tensor_count(lm):
    before = weights_fingerprint(lm)
    buffer = torch.zeros(8)
    lm.model.register_buffer("extra", buffer)
    one = weights_fingerprint(lm)
    lm.model.extra = buffer.reshape(2, 4)
    two = weights_fingerprint(lm)
    del lm.model.extra
    assert len({before, one, two}) == 3


def test_a_moved_folder_is_the_same_model_and_another_config_is_not(folder, lm, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    moved = load_model(ModelSource(str(tmp_path / "elsewhere")), dtype="float32", device="cpu")
    for identify in (weights_fingerprint, config_fingerprint, tokenizer_fingerprint):
        assert identify(moved) == identify(lm)
    path = tmp_path / "elsewhere" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    changed = load_model(ModelSource(str(path.parent)), dtype="float32", device="cpu")
    assert config_fingerprint(changed) != config_fingerprint(lm)


def test_a_scorer_depends_on_the_files_whose_names_it_imports(tmp_path):
    package = tmp_path / "heretic_kl"
    source = Path(heretic_kl.__file__).parent
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__", "*.jsonl"))
    scorer = scorer_folder() / "refusals.py"
    before = source_digest(scorer, package)
    assert before == source_digest(scorer, source)
    for name, matters in (
        ("scoring/refusal_rule.py", True),
        ("scoring/refusal_count.py", True),
        ("scoring/degenerate.py", True),
        ("kl/intervals.py", True),
        ("scoring/racing.py", False),
        ("run/session.py", False),
    ):
        file = package / name
        text = file.read_text(encoding="utf-8")
        file.write_text(text + "\nCHANGED = 1\n", encoding="utf-8")
        assert (source_digest(scorer, package) != before) == matters, name
        file.write_text(text, encoding="utf-8")


def test_a_plug_in_of_the_user_depends_on_what_it_imports_too(tmp_path):
    plug_in = tmp_path / "mine.py"
    plug_in.write_text("from heretic_kl.scoring import RefusalRule, Scorer\n")
    names = [file.name for file in source_files(plug_in)]
    assert names[0] == "mine.py"
    assert {"refusal_rule.py", "scorer.py"} <= set(names)
