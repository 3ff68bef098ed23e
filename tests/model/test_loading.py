import json

import pytest
import torch

from heretic_kl.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from heretic_kl.model import ModelSource, load_model
from heretic_kl.model.loading import devices, weights
from heretic_kl.model.loading.devices import dtype_candidates, resolve_device
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model, tiny_llama


def load(folder, **options):
    return load_model(ModelSource(str(folder)), device="cpu", **options)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_families_load_with_a_site_for_every_writer(tmp_path, family):
    lm = load_tiny_model(save_tiny_model(tmp_path / family, TINY_CONFIGS[family]()))
    assert [site.key[:2] for site in lm.architecture.sites] == [
        (layer, component) for layer in range(3) for component in ("attention", "mlp")
    ]
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert lm.dtype == torch.float32 and lm.source.short_name == family


def test_stored_dtype_is_the_checkpoints(tmp_path):
    folder = save_tiny_model(tmp_path / "m", tiny_llama(), dtype=torch.bfloat16)
    lm = load(folder, dtype="float32")
    assert (lm.dtype, lm.stored_dtype) == (torch.float32, torch.bfloat16)


def test_a_hub_model_may_be_named_with_its_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b@v2").mkdir()
    for text, name, revision in (
        ("org/x", "org/x", None),
        ("org/x@v1.0", "org/x", "v1.0"),
        ("org/x@refs/pr/1", "org/x", "refs/pr/1"),
        ("./a/x@v1", "./a/x@v1", None),
        ("b@v2", "b@v2", None),
        ("x@v1.gguf", "x@v1.gguf", None),
        ("org/x@../y", "org/x@../y", None),
    ):
        assert ModelSource.named(text) == ModelSource(name, revision), text


def test_a_dtype_without_finite_logits_is_passed_over(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    candidates = (torch.float16, torch.float32)
    monkeypatch.setattr(weights, "dtype_candidates", lambda *_: candidates)
    infinite = torch.full((1, 4, 9), torch.inf)
    probe = weights.probe_logits
    monkeypatch.setattr(
        weights, "probe_logits", lambda m: probe(m) if m.dtype == torch.float32 else infinite
    )
    assert load(folder).dtype == torch.float32
    monkeypatch.setattr(weights, "probe_logits", lambda model: infinite)
    with pytest.raises(ModelError, match="no finite logits in float16, float32"):
        load(folder)


def test_a_dtype_that_the_model_does_not_run_in_is_passed_over(tmp_path, monkeypatch):
    def mixed(model):
        if model.dtype is torch.bfloat16:
            raise RuntimeError("mixed dtype\nand more")
        return probe(model)

    probe = weights.probe_logits
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    monkeypatch.setattr(weights, "probe_logits", mixed)
    monkeypatch.setattr(devices, "cpu_multiplies_bfloat16", lambda: True)
    assert load_model(ModelSource(str(folder)), device="cpu").dtype is torch.float32
    with pytest.raises(ModelError, match=r"in bfloat16 \(mixed dtype\): try --dtype float32"):
        load_model(ModelSource(str(folder)), dtype="bfloat16", device="cpu")


def test_dtypes_to_try():
    cpu = dtype_candidates("auto", torch.device("cpu"))
    assert cpu[-1] == torch.float32
    gpu = dtype_candidates("auto", torch.device("cuda"))
    assert gpu == (torch.bfloat16, torch.float16, torch.float32)
    assert dtype_candidates("float16", torch.device("cpu")) == (torch.float16,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing/here", "no model at './nothing/here'"),
        ("missing.gguf", "no such GGUF file: 'missing.gguf'"),
    ],
)
def test_missing_sources_are_one_line(name, message):
    with pytest.raises(ModelNotFoundError, match=message):
        load(name)


def test_a_folder_without_a_model_names_the_gguf_in_it(tmp_path):
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"holds no config\.json; give the file itself"):
        load(tmp_path)


def test_unreachable_hub_ids_are_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="cannot load the tokenizer of 'nobody/nothing'"):
        load("nobody/nothing")


def test_pickled_weights_are_not_read(tmp_path):
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickled weights are not read"):
        load(folder)


@pytest.mark.parametrize("model_type", ["llama", "a_type_of_its_own"])
def test_code_that_comes_with_a_model_is_not_run(tmp_path, model_type):
    folder, trace = save_tiny_model(tmp_path / "m", tiny_llama()), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": model_type, "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise ValueError('ran')\n")
    if model_type == "llama":  # transformers has code for it
        load(folder)
    else:
        with pytest.raises(ModelError) as raised:
            load(folder)
        assert "--trust-remote-code" in str(raised.value) and "\n" not in str(raised.value)
    assert not trace.exists()


def test_encoder_decoders_are_rejected(tmp_path):
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    config = {"model_type": "t5", "d_model": 8, "num_layers": 1, "is_encoder_decoder": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        load(folder)


def test_unknown_devices_are_one_line():
    with pytest.raises(ModelError, match="device 'gpu9' cannot be used"):
        resolve_device("gpu9")
    assert resolve_device("cpu").type == "cpu"


def test_a_checkpoint_that_lacks_weights_is_rejected(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 of .* model\.layers\.1\.mlp"):
        load(folder)


def test_a_truncated_checkpoint_is_one_line(tmp_path):
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match="cannot load the model of|no safetensors"):
        load(folder)
