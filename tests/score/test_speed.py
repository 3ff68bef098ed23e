"""Trees of tokens, packed weights, models of one kind probed once: faster, with equal results."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_kl.model import packed_bytes
from heretic_kl.score import TeacherForcedKL
from heretic_kl.score.reference_run import ReferenceRun
from heretic_kl.testing import load_tiny_model

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake"]


def built(reference, **options):
    return TeacherForcedKL(reference, prompts=PROMPTS, kl_tokens=4, dtype="float32", **options)


@pytest.fixture
def plain(monkeypatch):
    """Everything is run without them."""
    real = ReferenceRun.over.__func__

    def over(cls, *words, **options):
        return real(cls, *words, **{**options, "trees": False, "packs": False})

    monkeypatch.setattr(ReferenceRun, "over", classmethod(over))


@pytest.fixture(scope="module")
def kl(original):
    measures = built(original)
    assert measures._run.trees and measures._run.packs is (packed_bytes_of(original) > 0)
    return measures


def packed_bytes_of(folder):
    return packed_bytes(load_tiny_model(folder))


def test_results_are_equal_within_the_noise_floor(kl, other, original, plain):
    without = built(original)
    assert not without._run.trees and not without._run.packs
    ours, theirs = kl.score(other), without.score(other)
    assert torch.allclose(ours.table.values, theirs.table.values, rtol=1e-4, atol=1e-9)
    assert kl.score(original).kl == without.score(original).kl == 0.0


def test_a_model_that_is_the_caller_s_is_as_before_and_at_zero(kl, original, load):
    model = load(original)
    assert kl.score(model).kl == 0.0
    assert not any("forward" in vars(module) for module in model.modules())
    assert not built(model, tokenizer=load_tiny_model(original).chat.tokenizer)._run.packs


def test_another_head_goes_through_the_same_arithmetic(kl, original, tmp_path, load):
    tensors = load_file(original / "model.safetensors")
    moved = {n: v.clone() + 1e-3 * ("lm_head" in n or "embed" in n) for n, v in tensors.items()}
    changed = tmp_path / "m"
    changed.mkdir()
    for file in original.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    save_file(moved, changed / "model.safetensors", {"format": "pt"})
    measured = kl.score(changed)
    assert 0.0 < measured.kl < 1.0 and kl.score(load(changed)).kl == measured.kl


def test_a_stored_reference_runs_its_candidates_alike(kl, original, other, tmp_path):
    kl.save(tmp_path / "r.safetensors", store="logits")
    stored = TeacherForcedKL.load(tmp_path / "r.safetensors")
    assert (stored._run.trees, stored._run.packs) == (kl._run.trees, kl._run.packs)
    kl.save(tmp_path / "h.safetensors")
    assert TeacherForcedKL.load(tmp_path / "h.safetensors").score(original).kl == 0.0


def test_packed_weights_need_memory_for_both_copies(original, monkeypatch):
    monkeypatch.setattr("heretic_kl.score.reference_run.free_memory", lambda device: 1000)
    assert not built(original)._run.packs


def test_models_of_one_kind_are_probed_once(original, other, make_adapter, monkeypatch):
    from heretic_kl.model.loading import adopt

    probed = []
    real = adopt.find_capabilities
    monkeypatch.setattr(
        adopt, "find_capabilities", lambda lm: (probed.append(type(lm.model)), real(lm))[1]
    )
    kl = built(original)
    for candidate in (other, original, other):
        kl.score(candidate)
    assert len(probed) == 1
    kl.score(make_adapter(original, str(original)))
    kl.score(other, dtype="bfloat16")
    assert len(probed) == 3
