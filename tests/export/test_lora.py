from __future__ import annotations

import json
import warnings

import pytest
import torch
from tiny_edits import edited_logits, logits, make_plan
from transformers import AutoModelForCausalLM

from heretic_kl.ablation import Operator
from heretic_kl.errors import ExportError
from heretic_kl.export import save_lora, saved_model
from heretic_kl.export.lora import LoraFactors, _best_factors, read_lora
from heretic_kl.model import edited

BIASED = {"attention_bias": True, "mlp_bias": True}
CASES = [
    ("llama", {}),
    ("llama", BIASED),
    ("llama", {"mlp_bias": True}),
    ("gpt2", {}),
    ("qwen2", {}),
    ("gemma2", {}),
]


def with_peft(original, adapter):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    with warnings.catch_warnings():
        # PEFT remarks on a bias of the adapter where the module itself has none.
        warnings.filterwarnings("ignore", message=".*lora_bias.*")
        # PEFT asks transformers for an attribute by its old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        return peft.PeftModel.from_pretrained(base, adapter).eval()


def peft_sites(model):
    return {
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_peft_gives_exactly_what_the_operators_give(build, unchanged, tmp_path, family, changes):
    lm = build(family, **changes)
    unchanged(lm)
    plan = make_plan(lm)
    saved = save_lora(lm, plan, tmp_path / "new")
    assert saved.exact and saved.rank == 1
    assert saved.relative_error == saved.worst_relative_error == 0.0
    model = with_peft(tmp_path / "original", tmp_path / "new")
    assert peft_sites(model) == {key.path for key in plan}
    expected = edited_logits(lm, plan)
    torch.testing.assert_close(logits(model.base_model.model), expected, rtol=1e-5, atol=2e-5)
    with saved_model(tmp_path / "new", "lora", lm) as reloaded:
        torch.testing.assert_close(logits(reloaded.model), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("norm", ["row", "normalized_row"])
@pytest.mark.parametrize(("family", "changes"), [("llama", BIASED), ("gpt2", {})])
def test_row_scales_are_approximated_with_a_stated_error(build, tmp_path, family, changes, norm):
    lm = build(family, **changes)
    plan = make_plan(lm, norm)
    errors = []
    for rank in (2, 8, 32):
        saved = save_lora(lm, plan, tmp_path / f"r{rank}", rank=rank)
        assert saved.rank == rank and not saved.exact
        assert saved.worst_relative_error >= saved.relative_error
        errors.append(saved.relative_error)
        missing = []
        for path, factors in read_lora(tmp_path / f"r{rank}").items():
            key = next(key for key in plan if key.path == path)
            weight = lm.architecture.site(key).weight()
            delta = plan[key].bake(weight)[0] - weight
            missing.append(float((delta - factors.b @ factors.a).norm() / delta.norm()))
        assert max(missing) == pytest.approx(saved.worst_relative_error, rel=1e-2, abs=1e-5)
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5  # of full rank
    model = with_peft(tmp_path / "original", tmp_path / "r32")
    expected = edited_logits(lm, plan)
    torch.testing.assert_close(logits(model.base_model.model), expected, rtol=1e-4, atol=1e-4)


def test_the_default_rank_is_16_for_row_scales_and_the_hooks_are_what_peft_computes(
    build, unchanged, tmp_path
):
    lm = build()
    unchanged(lm)
    saved = save_lora(lm, make_plan(lm, "row"), tmp_path / "new")
    assert saved.rank == 16 and 0 < saved.relative_error < 1
    model = with_peft(tmp_path / "original", tmp_path / "new")
    with saved_model(tmp_path / "new", "lora", lm) as reloaded:
        ours = logits(reloaded.model)
    torch.testing.assert_close(ours, logits(model.base_model.model), rtol=1e-5, atol=1e-5)


def test_large_matrices_are_decomposed_at_random_but_always_the_same(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.diag(0.8 ** torch.arange(300.0))
    delta = torch.randn(300, 300, generator=generator) @ spectrum
    state = torch.random.get_rng_state()
    first, second = _best_factors(delta, 8), _best_factors(delta, 8)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    values = torch.linalg.svdvals(delta)
    best = values[8:].square().sum().sqrt()
    assert float((delta - first[1] @ first[0]).norm()) < 1.001 * float(best)


def test_a_rank_below_the_operators_own_is_an_approximation(build, tmp_path):
    lm = build()
    generator = torch.Generator().manual_seed(3)
    (key, *_) = make_plan(lm)
    left, right = (torch.randn(32, 3, generator=generator) for _ in range(2))
    plan = {key: Operator(left, right)}
    assert save_lora(lm, plan, tmp_path / "a").rank == 3
    assert save_lora(lm, plan, tmp_path / "b", rank=9).rank == 3  # more would be zeros
    low = save_lora(lm, plan, tmp_path / "c", rank=2)
    assert low.rank == 2 and not low.exact and low.relative_error > 0.01


def test_the_adapter_names_its_base_without_a_path(build, tmp_path):
    lm = build()
    save_lora(lm, make_plan(lm), tmp_path / "new")
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "original"
    assert str(tmp_path) not in json.dumps(config)
    assert config["lora_alpha"] == config["r"]


def test_an_empty_edit_and_a_bad_rank_are_errors(build, tmp_path):
    lm = build()
    with pytest.raises(ExportError, match="changes nothing"):
        save_lora(lm, {}, tmp_path / "new")
    with pytest.raises(ValueError, match="at least 1"):
        save_lora(lm, make_plan(lm), tmp_path / "new", rank=0)
    assert not (tmp_path / "new").exists()


def test_targets_that_peft_would_redirect_to_experts_are_refused(build, tmp_path):
    lm = build()
    lm.model.model.layers[0].mlp.register_module("experts", torch.nn.Module())
    lm.model.model.layers[0].mlp.experts.w = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with pytest.raises(ExportError, match="beside fused experts: save the merged model"):
        save_lora(lm, make_plan(lm), tmp_path / "new")


def test_a_broken_or_foreign_adapter_is_one_line(build, tmp_path):
    lm = build()
    plan = make_plan(lm)
    save_lora(lm, plan, tmp_path / "new")
    (tmp_path / "new" / "adapter_model.safetensors").write_bytes(b"x" * 20)
    with (
        pytest.raises(ExportError, match="cannot be read"),
        saved_model(tmp_path / "new", "lora", lm),
    ):
        raise AssertionError("not reached")
    assert LoraFactors(torch.zeros(1, 2), torch.zeros(3, 1)).bias is None


def test_hooks_go_when_the_block_fails(build, unchanged, tmp_path):
    lm = build()
    unchanged(lm)
    plan = make_plan(lm)
    save_lora(lm, plan, tmp_path / "new")
    before = logits(lm.model)
    with pytest.raises(RuntimeError), saved_model(tmp_path / "new", "lora", lm):
        assert not torch.equal(logits(lm.model), before)
        raise RuntimeError
    assert torch.equal(logits(lm.model), before)
    with edited(lm.architecture, {}):
        assert torch.equal(logits(lm.model), before)
