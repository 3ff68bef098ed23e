from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_edits import edited_logits, logits, make_plan
from transformers import AutoModelForCausalLM, AutoTokenizer

from heretic_kl.ablation import Operator
from heretic_kl.errors import ExportError
from heretic_kl.export import merge, save_merged
from heretic_kl.model import ModelSource
from heretic_kl.testing import load_tiny_model

MODES = ["none", "row", "normalized_row"]
CASES = [
    *[("llama", mode, {}) for mode in MODES],
    *[("llama", mode, {"attention_bias": True, "mlp_bias": True}) for mode in MODES],
    *[("gpt2", mode, {}) for mode in MODES],
    *[("qwen2", mode, {}) for mode in MODES],
    ("gemma2", "none", {}),
]
FEWER_CASES = [
    ("llama", "none", {}),
    ("llama", "row", {"attention_bias": True, "mlp_bias": True}),
    ("gpt2", "normalized_row", {}),
    ("qwen2", "row", {}),
    ("gemma2", "none", {}),
]


def plain(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "norm", "changes"), CASES)
def test_plain_transformers_gives_what_the_operators_give(
    build, unchanged, tmp_path, family, norm, changes
):
    lm = build(family, **changes)
    unchanged(lm)
    plan = make_plan(lm, norm)
    saved = save_merged(lm, plan, tmp_path / "new")
    assert saved.route == "streamed"
    expected = edited_logits(lm, plan)
    assert (expected - logits(lm.model)).abs().max() > 0.05  # the edit is one that shows
    torch.testing.assert_close(logits(plain(tmp_path / "new")), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("family", "norm", "changes"), FEWER_CASES)
def test_the_model_in_memory_written_out_gives_the_same(
    build, unchanged, tmp_path, monkeypatch, family, norm, changes
):
    lm = build(family, **changes)
    unchanged(lm)
    plan = make_plan(lm, norm)
    monkeypatch.setattr(merge, "find_checkpoint", lambda lm: None)
    saved = save_merged(lm, plan, tmp_path / "new")
    assert saved.route == "rewritten"
    torch.testing.assert_close(
        logits(plain(tmp_path / "new")), edited_logits(lm, plan), rtol=1e-5, atol=2e-5
    )


def test_everything_that_is_not_edited_is_kept_byte_for_byte(build, tmp_path):
    lm = build(max_shard_size="30KB")
    original = tmp_path / "original"
    plan = dict(list(make_plan(lm).items())[:1])
    (key,) = plan
    saved = save_merged(lm, plan, tmp_path / "new")
    assert saved.edited_tensors == (f"{key.path}.weight",)
    assert len(list(original.glob("*.safetensors"))) > 2
    for file in original.iterdir():
        ours = tmp_path / "new" / file.name
        if file.suffix != ".safetensors":
            assert ours.read_bytes() == file.read_bytes()
            continue
        before, after = load_file(file), load_file(ours)
        assert list(before) == list(after)
        changed = {n for n in before if before[n].numpy().tobytes() != after[n].numpy().tobytes()}
        assert changed <= set(saved.edited_tensors)
        if not changed:
            assert ours.read_bytes() == file.read_bytes()


def test_tensors_the_model_does_not_load_and_odd_types_survive(build, tmp_path):
    lm = build(dtype=torch.bfloat16)
    file = tmp_path / "original" / "model.safetensors"
    tensors = load_file(file)
    extra = {
        "mtp.head.weight": torch.randn(3, 5),
        "mtp.scale": torch.zeros(4).to(torch.float8_e4m3fn),
        "mtp.steps": torch.arange(4),
        "mtp.nothing": torch.empty(0, 3),
    }
    save_file({**tensors, **extra}, file, metadata={"format": "pt", "note": "kept"})
    save_merged(lm, make_plan(lm), tmp_path / "new")
    after = load_file(tmp_path / "new" / "model.safetensors")
    for name, tensor in extra.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8))
    assert b'"note":"kept"' in (tmp_path / "new" / "model.safetensors").read_bytes()[:20000]


def test_stored_type_is_kept_and_costs_its_rounding_only(build, tmp_path):
    lm = build(dtype=torch.bfloat16)
    assert lm.stored_dtype is torch.bfloat16
    plan = make_plan(lm)
    save_merged(lm, plan, tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for key, operator in plan.items():
        baked, _ = operator.bake(lm.architecture.site(key).weight())
        assert torch.equal(tensors[f"{key.path}.weight"], baked.to(torch.bfloat16))


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_explicit_type_is_that_of_every_weight(build, tmp_path, monkeypatch, dtype, streamed):
    lm = build("qwen2", dtype=torch.bfloat16, max_shard_size="30KB")
    if not streamed:
        monkeypatch.setattr(merge, "find_checkpoint", lambda lm: None)
    plan = make_plan(lm)
    save_merged(lm, plan, tmp_path / "new", dtype=dtype)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.dtype is dtype
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] in str(dtype)
    files = list((tmp_path / "new").glob("*.safetensors"))
    tensors = {name: t for file in files for name, t in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert "lm_head.weight" not in tensors  # tied
    index = tmp_path / "new" / "model.safetensors.index.json"
    if streamed:
        size = json.loads(index.read_text())["metadata"]["total_size"]
        assert size == sum(t.numel() * t.element_size() for t in tensors.values())
    torch.testing.assert_close(
        logits(plain(tmp_path / "new")), edited_logits(lm, plan), rtol=0.1, atol=0.3
    )


def test_a_value_too_large_for_float16_is_an_error(build, tmp_path):
    lm = build()
    (key, *_), width = make_plan(lm), lm.architecture.width
    huge = {key: Operator(torch.zeros(width, 1), torch.zeros(width, 1), torch.full((width,), 1e9))}
    with pytest.raises(ExportError, match="too large for float16"):
        save_merged(lm, huge, tmp_path / "new", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_a_checkpoint_of_the_bare_body_keeps_its_names(build, tmp_path):
    build("gpt2")
    file = tmp_path / "original" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    from heretic_kl.testing import load_tiny_model

    lm = load_tiny_model(tmp_path / "original")
    plan = make_plan(lm)
    saved = save_merged(lm, plan, tmp_path / "new")
    assert saved.route == "streamed"
    assert all(name.startswith("h.") for name in saved.edited_tensors)
    torch.testing.assert_close(
        logits(plain(tmp_path / "new")), edited_logits(lm, plan), rtol=1e-5, atol=2e-5
    )


def test_a_vision_language_model_keeps_its_tower_and_its_names(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    from heretic_kl.testing import load_tiny_model, tiny_gemma2, tiny_tokenizer

    sizes = tiny_gemma2().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
    text = {name: sizes[name] for name in (*names, "num_attention_heads", "num_key_value_heads")}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text |= {"initializer_range": 0.2, "eos_token_id": 3, "pad_token_id": 1, "bos_token_id": None}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    lm = load_tiny_model(tmp_path / "original")
    plan = make_plan(lm)
    saved = save_merged(lm, plan, tmp_path / "new")
    assert saved.route == "streamed"
    # In memory it is model.language_model.layers: transformers renames as it loads.
    assert all(n.startswith("language_model.model.layers") for n in saved.edited_tensors)
    before = load_file(tmp_path / "original" / "model.safetensors")
    after = load_file(tmp_path / "new" / "model.safetensors")
    assert any("vision_tower" in name for name in before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == set(saved.edited_tensors)
    torch.testing.assert_close(
        logits(plain(tmp_path / "new")), edited_logits(lm, plan), rtol=1e-5, atol=2e-5
    )


def test_files_that_are_not_what_is_in_memory_are_not_edited(build, tmp_path):
    lm = build()
    file = tmp_path / "original" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name] = tensors[name] + 1
    tensors["mtp.weight"] = torch.ones(2)
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "original" / "LICENSE").write_text("ours")
    plan = make_plan(lm)
    saved = save_merged(lm, plan, tmp_path / "new")
    assert saved.route == "rewritten"
    assert (tmp_path / "new" / "LICENSE").read_text() == "ours"
    AutoTokenizer.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(
        logits(plain(tmp_path / "new")), edited_logits(lm, plan), rtol=1e-5, atol=2e-5
    )


def test_a_gguf_source_is_written_from_memory_with_its_tokenizer(build, unchanged, tmp_path):
    lm = dataclasses.replace(
        build(), source=ModelSource("weights.gguf"), stored_dtype=torch.bfloat16
    )
    unchanged(lm)
    save_merged(lm, make_plan(lm), tmp_path / "new")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.chat_template == lm.chat.template
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert loaded.dtype is torch.bfloat16
    assert not list(tmp_path.glob("*/*.gguf"))


def test_other_files_come_along_and_pickles_do_not(build, tmp_path):
    lm = build()
    original = tmp_path / "original"
    for name in ("LICENSE", "README.md", "reproduce.json", "notes/figure.svg", "x.py"):
        (original / name).parent.mkdir(exist_ok=True)
        (original / name).write_text(name)
    for name in ("pytorch_model.bin", "extra/optimizer.pt", "a.pkl", "b.pth", "model.gguf"):
        (original / name).parent.mkdir(exist_ok=True)
        (original / name).write_bytes(b"code")
    (original / ".git").mkdir()
    (original / ".git" / "config").write_text("secret")
    (original / "checkpoint-5").mkdir()
    shutil.copy(original / "model.safetensors", original / "checkpoint-5" / "model.safetensors")
    shutil.copy(original / "model.safetensors", original / "consolidated.safetensors")
    save_file({"v": torch.ones(2)}, original / "voice.safetensors")
    new = tmp_path / "new"
    save_merged(lm, make_plan(lm), new)
    names = {path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file()}
    assert {
        "LICENSE",
        "README.original.md",
        "reproduce.original.json",
        "notes/figure.svg",
        "x.py",
        "voice.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    } <= names
    assert not {"README.md", "reproduce.json", ".git/config"} & names
    left_out = {
        "a.pkl",
        "b.pth",
        "checkpoint-5/model.safetensors",
        "consolidated.safetensors",
        "extra/optimizer.pt",
        "model.gguf",
        "pytorch_model.bin",
    }
    assert not left_out & names


def test_saving_a_second_time_keeps_the_first_original_card(build, tmp_path):
    lm = build()
    (tmp_path / "original" / "README.md").write_text("second")
    (tmp_path / "original" / "README.original.md").write_text("first")
    save_merged(lm, make_plan(lm), tmp_path / "new")
    assert (tmp_path / "new" / "README.original.md").read_text() == "first"
    assert (tmp_path / "new" / "README.original-2.md").read_text() == "second"


def test_a_folder_inside_the_original_does_not_copy_itself(build, tmp_path):
    lm = build()
    target = tmp_path / "original" / "out" / "new"
    save_merged(lm, make_plan(lm), target)
    save_merged(lm, make_plan(lm), target, overwrite=True)
    assert not (target / "out").exists()


@pytest.mark.parametrize("name", ["original", "."])
def test_the_original_is_never_overwritten(build, tmp_path, name):
    lm = build()
    (tmp_path / "config.json").write_text("{}")
    before = (tmp_path / "original" / "model.safetensors").read_bytes()
    with pytest.raises(ExportError, match="original model is there"):
        save_merged(lm, make_plan(lm), tmp_path / name, overwrite=True)
    assert (tmp_path / "original" / "model.safetensors").read_bytes() == before


def test_a_shift_without_a_bias_is_an_error(build, tmp_path):
    lm = build()
    (key, *_) = make_plan(lm)
    zeros = torch.zeros(lm.architecture.width, 1)
    plan = {key: Operator(zeros, zeros, shift=torch.ones(lm.architecture.width))}
    with pytest.raises(ExportError, match="has no bias"):
        save_merged(lm, plan, tmp_path / "new")


def test_a_model_dequantized_as_it_was_loaded_is_saved_in_full_precision(
    build, tmp_path, monkeypatch
):
    lm = build()
    marks = object()
    lm.model.hf_quantizer, lm.model.is_quantized = marks, True
    lm.model.config.quantization_config = {"quant_method": "mxfp4"}
    monkeypatch.setattr("heretic_kl.export.merge.find_checkpoint", lambda lm: None)
    save_merged(lm, make_plan(lm), tmp_path / "new")
    assert lm.model.hf_quantizer is marks and lm.model.config.quantization_config
    config = json.loads((tmp_path / "new" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    saved = load_tiny_model(tmp_path / "new")
    torch.testing.assert_close(logits(saved.model), edited_logits(lm, make_plan(lm)))


def test_a_hub_snapshot_is_streamed_with_all_its_files(build, tmp_path, monkeypatch):
    import huggingface_hub

    lm = build()
    (tmp_path / "original" / "LICENSE").write_text("ours")
    asked = []

    def snapshot_download(name, **options):
        asked.append((name, options["revision"], options["local_files_only"]))
        if not options["local_files_only"]:
            raise OSError("no network")
        return str(tmp_path / "original")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    lm = dataclasses.replace(lm, source=ModelSource("someone/model", "abc"))
    saved = save_merged(lm, make_plan(lm), tmp_path / "new")
    assert saved.route == "streamed"
    assert asked == [("someone/model", "abc", False), ("someone/model", "abc", True)]
    assert (tmp_path / "new" / "LICENSE").is_file()


def test_without_any_file_of_the_original_the_memory_is_written(build, tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(name, **options):
        raise OSError("nothing")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    lm = dataclasses.replace(build(), source=ModelSource("someone/model"))
    assert save_merged(lm, make_plan(lm), tmp_path / "new").route == "rewritten"
