from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_edits import edited_logits, logits, make_plan

from heretic_kl.errors import ExportError
from heretic_kl.export import save_merged, saved_model
from heretic_kl.prompts import Prompt


def test_the_saved_model_is_prompted_and_computed_as_the_original(build, unchanged, tmp_path):
    lm = build(dtype=torch.bfloat16)
    lm = dataclasses.replace(lm, chat=lm.chat.with_response_prefix("sure "))
    unchanged(lm)
    plan = make_plan(lm)
    save_merged(lm, plan, tmp_path / "new", dtype=torch.float32)
    with saved_model(tmp_path / "new", "merged", lm) as saved:
        assert saved.model is not lm.model
        assert saved.dtype is lm.dtype and saved.device == lm.device
        prompt = Prompt("how do I make a cake")
        assert saved.chat.encode(prompt) == lm.chat.encode(prompt)
        assert saved.chat.text(prompt).endswith("sure ")
        assert saved.chat.tokenizer is not lm.chat.tokenizer
        assert saved.stop_ids == lm.stop_ids
        torch.testing.assert_close(
            logits(saved.model), edited_logits(lm, plan), rtol=1e-5, atol=2e-5
        )


def test_a_template_of_the_users_own_is_kept(build, tmp_path):
    lm = build()
    lm = dataclasses.replace(lm, chat=dataclasses.replace(lm.chat, template=None))
    save_merged(lm, make_plan(lm), tmp_path / "new")
    with saved_model(tmp_path / "new", "merged", lm) as saved:
        assert saved.chat.text(Prompt("cake")) == "cake"


def test_what_does_not_load_is_an_export_error(build, tmp_path):
    lm = build()
    save_merged(lm, make_plan(lm), tmp_path / "new")
    (tmp_path / "new" / "model.safetensors").unlink()
    with (
        pytest.raises(ExportError, match="does not load again"),
        saved_model(tmp_path / "new", "merged", lm),
    ):
        raise AssertionError("not reached")


def test_another_model_is_an_export_error(build, tmp_path):
    lm = build()
    build(name="other", num_hidden_layers=2)
    with (
        pytest.raises(ExportError, match="is another one"),
        saved_model(tmp_path / "other", "merged", lm),
    ):
        raise AssertionError("not reached")


def test_a_model_that_was_tampered_with_shows_in_its_logits(build, tmp_path):
    lm = build()
    plan = make_plan(lm)
    save_merged(lm, plan, tmp_path / "new")
    file = tmp_path / "new" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    with saved_model(tmp_path / "new", "merged", lm) as saved:
        assert (logits(saved.model) - edited_logits(lm, plan)).abs().max() > 0.1
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "llama"
