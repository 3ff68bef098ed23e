"""A model of which parts wait on the disk: found, searched and saved as if it were in memory."""

import pytest
import torch
from safetensors.torch import load_file
from sessions import settings

from heretic_kl import Session, events
from heretic_kl.ablation import EditParameters
from heretic_kl.export import reload
from heretic_kl.model import ModelSource, load_model, placement
from heretic_kl.model.placement import device_of, in_memory, is_offloaded
from heretic_kl.run.setup.fingerprint import weights_fingerprint
from heretic_kl.testing import save_tiny_model, tiny_llama, tiny_qwen2

ON_DISK = {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
TOKENS = torch.tensor([[5, 9, 12, 7, 3]])


@pytest.fixture
def little_memory(monkeypatch):
    """The machine seems to hold half of the tiny model."""
    name = "transformers.integrations.accelerate.accelerate_max_memory"
    monkeypatch.setattr(name, lambda limits: {"cpu": 60_000})


@pytest.fixture(params=["llama", "tied"])
def folder(request, tmp_path):
    config = tiny_llama(attention_bias=True) if request.param == "llama" else tiny_qwen2()
    return save_tiny_model(tmp_path / "model", config)


def loaded(folder, **changes):
    return load_model(ModelSource(str(folder)), dtype="float32", device="cpu", **changes)


def test_sites_weights_and_logits_are_those_of_the_whole_model(folder):
    whole = loaded(folder)
    tied = whole.model.config.tie_word_embeddings
    rest = {name: "cpu" for name, _ in whole.model.named_modules() if name and "layers" not in name}
    places = {**rest, "model.layers.0": "cpu", **ON_DISK}
    places.pop("model")
    if tied:
        places["lm_head"] = "cpu"
    parts = loaded(folder, device_map=places)
    assert is_offloaded(parts.model) and not is_offloaded(whole.model)
    assert parts.device.type == "cpu" and parts.capabilities == whole.capabilities
    for one, two in zip(whole.architecture.sites, parts.architecture.sites, strict=True):
        assert one.key == two.key and one.tensors == two.tensors
        assert torch.equal(one.weight(), two.weight())
        assert (one.bias() is None and two.bias() is None) or torch.equal(one.bias(), two.bias())
    assert torch.equal(whole.head.weight, parts.head.weight)
    assert weights_fingerprint(whole) == weights_fingerprint(parts)
    layer = parts.architecture.layers[2]
    assert device_of(layer).type == "cpu"
    with in_memory(layer):
        assert not is_offloaded(layer)
        one, two = (lm.model(TOKENS, use_cache=False).logits for lm in (whole, parts))
    assert torch.equal(one, two) and is_offloaded(layer)  # brought and taken away again


def test_a_run_with_offloading_ends_as_one_without(workplace, tmp_path, little_memory):  # noqa: F811
    seen, records = [], []
    for name, place in (("whole", {}), ("parts", {"device_map": "auto"})):
        chosen = settings(workplace, tmp_path / name, trials=4, racing=False, **place)
        with Session(chosen, seen.append) as session:
            assert is_offloaded(session.parts.lm.model) == bool(place)
            session.search()
            session.refine()
            records.append(session.trials[:4])
            saved = session.save(session.trials[0], tmp_path / f"{name}-saved", "merged")
            assert saved.merge_kl < 1e-9
    for one, two in zip(*records, strict=True):
        assert one.parameters == two.parameters
        for score, again in zip(one.scores.values(), two.scores.values(), strict=True):
            assert again.value == pytest.approx(score.value, rel=1e-5, abs=1e-9)
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any("no edit is refined: parts of the model are offloaded" in line for line in notices)
    assert any("parts of the model are offloaded" in line and "slow" in line for line in notices)
    one, two = (load_file(tmp_path / f"{n}-saved/model.safetensors") for n in ("whole", "parts"))
    for key, tensor in one.items():
        assert torch.equal(tensor, two[key]), key


def test_row_norms_of_offloaded_weights(workplace, tmp_path, little_memory):  # noqa: F811
    """They are read where the plan is made."""
    plans = []
    for place in ({}, {"device_map": "auto"}):
        chosen = settings(workplace, tmp_path / str(place), trials=1, edit={"norm": "row"}, **place)
        with Session(chosen) as session:
            session.search()
            edit = session.trials[0].edit
            assert isinstance(edit, EditParameters)
            plans.append(session.parts.plan(edit))
    for key, operator in plans[0].items():
        for name in ("left", "right", "scale"):
            one, two = getattr(operator, name), getattr(plans[1][key], name)
            torch.testing.assert_close(one, two)


def test_a_model_is_saved_after_memory_ran_out(workplace, tmp_path, monkeypatch):  # noqa: F811
    """Its layers wait in the machine's memory by hooks, without a map of devices."""
    with Session(settings(workplace, tmp_path, trials=2)) as session:
        session.search()
        monkeypatch.setattr(placement, "on_accelerator", lambda tensor: True)
        monkeypatch.setattr(reload, "on_accelerator", lambda tensor: True)
        assert session.parts.engine._offload()
        model = session.parts.lm.model
        assert is_offloaded(model) and not hasattr(model, "hf_device_map")
        for form in ("merged", "lora"):
            saved = session.save(session.trials[0], tmp_path / form, form)
            assert saved.merge_kl < 1e-9 and is_offloaded(model)
            assert {"README.md", "reproduce.json"} <= {p.name for p in (tmp_path / form).iterdir()}
            for name, score in saved.trial_scores.items():
                assert saved.saved_scores[name].value == pytest.approx(score.value, rel=1e-5)
