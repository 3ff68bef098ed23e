"""Files with any bytes changed are read, or refused in one line: no traceback, no hang."""

import json
import os
import warnings

import optuna
import peft
import pyarrow
import pytest
import torch
from bounds import TooLong, bounded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optuna.distributions import FloatDistribution
from pyarrow.parquet import write_table

from heretic_kl.config import load_settings
from heretic_kl.config.reading import _toml
from heretic_kl.errors import HereticKLError, PromptError
from heretic_kl.export import read_reproduction
from heretic_kl.kl.head import REFERENCE_KIND
from heretic_kl.kl.storage import load_tensors, save_tensors
from heretic_kl.model.loading.adapters import adapter_base, check_adapter, with_adapter
from heretic_kl.prompts import DatasetSpec, Prompt, load_prompts
from heretic_kl.score import Document, TeacherForcedKL, TextKL
from heretic_kl.search import check_storage, open_storage, read_study
from heretic_kl.testing import (
    WORDS,
    load_tiny_model,
    save_tiny_model,
    tiny_llama,
    tiny_tokenizer,
)

FUZZ = settings(
    max_examples=int(os.environ.get("HERETIC_KL_TEST_FUZZ", "100")),
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


def test_a_hang_and_a_lack_of_memory_fail():
    with pytest.raises(TooLong), bounded(seconds=0.1):
        while True:
            pass
    with pytest.raises(AssertionError), bounded():
        try:
            bytearray(1 << 40)
        except MemoryError as error:
            raise PromptError("cannot be read") from error


@st.composite
def changed(draw, whole):
    """Bytes of which some are changed, and the end is perhaps missing."""
    content = bytearray(whole)
    for place in draw(st.lists(st.integers(0, len(whole) - 1), max_size=6)):
        content[place] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(len(content) // 2, len(content)))])


@FUZZ
@given(st.binary(max_size=200) | changed(b'[prompts.harmful]\ntrain.source = "a"\nx = [1, 2.5]\n'))
def test_a_settings_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(content)
    for read in (lambda: _toml(path), lambda: load_settings(["--config", str(path)])):
        with bounded(lines=True):
            read()


def places(value, path=()):
    """Where the parts of a JSON value are, itself apart."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


@st.composite
def with_changes(draw, whole):
    """JSON of which parts, at any depth, are other values or gone."""
    content = json.loads(json.dumps(whole))
    for path in draw(st.lists(st.sampled_from(sorted(places(whole), key=str)), min_size=1)):
        inner = content
        for key in path[:-1]:
            if not isinstance(inner, dict | list) or key not in places_of(inner):
                break
            inner = inner[key]
        else:
            if isinstance(inner, dict | list) and path[-1] in places_of(inner):
                if draw(st.booleans()):
                    inner[path[-1]] = draw(JSON)
                else:
                    del inner[path[-1]]
    return content


def places_of(value):
    return value.keys() if isinstance(value, dict) else range(len(value))


KERNEL = {"peak_weight": 1.0, "peak_position": 1.0, "floor_weight": 0.5, "reach": 2.0}
REPRODUCTION = {
    "format": 3,
    "form": "merged",
    "base": {"name": "org/model", "on_hub": True, "revision": "abc"},
    "trial": {
        "number": 1,
        "of": 4,
        "pick_rule": "knee",
        "parameters": {"direction_scope": "per layer", "mlp.reach": 2.0},
        "edit": {"direction_position": None, "kernels": {"mlp": KERNEL}, "norm": "none"},
    },
    "test_scores": {"refusals": {"saved": {"value": 0.1, "text": "1/10"}}},
    "settings": {
        "seed": 0,
        "kl_tokens": 3,
        "chat_template": "model",
        "scorers": {"refusals": {"use": "refusals", "settings": {}}},
        "prompts": {"harmful": {"train": {"source": "org/set", "more": [{"source": "a"}]}}},
    },
    "versions": {"torch": "2"},
    "calibration": {"dtype": "float32", "batch_size": 4},
    "files": {"model.safetensors": {"bytes": 3, "sha256": "0" * 64}},
}


def test_the_whole_reproduction_file_is_one(tmp_path):
    (tmp_path / "reproduce.json").write_text(json.dumps(REPRODUCTION))
    assert read_reproduction(tmp_path).taken_settings()[0]["model"] == "org/model"


@FUZZ
@given(with_changes(REPRODUCTION))
def test_parts_of_a_reproduction_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "parts.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with bounded():
        reproduction = read_reproduction(path)
        reproduction.taken_settings()
        reproduction.weights_beside({"model.safetensors": None})
        reproduction.learned()


def parquet():
    """A file of two prompts."""
    sink = pyarrow.BufferOutputStream()
    write_table(pyarrow.table({"text": ["one", "two"]}), sink)
    return sink.getvalue().to_pybytes()


PROMPTS = {
    "p.txt": b"one\ntwo\n",
    "p.csv": b'text,b\n"one",2\n',
    "p.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "p.json": b'[{"text": "one"}, {"text": "two"}]',
    "p.parquet": parquet(),
}


@settings(FUZZ, max_examples=FUZZ.max_examples // 4)  # `datasets` takes its time
@given(st.data())
def test_a_file_of_prompts(tmp_path_factory, data):
    name = data.draw(st.sampled_from(sorted(PROMPTS)))
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data.draw(st.binary(max_size=99) | changed(PROMPTS[name])))
    with bounded():
        assert load_prompts(DatasetSpec(str(path)))


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    """The journal of a study with a few trials, which is read whole."""
    folder = tmp_path_factory.mktemp("journal")
    with open_storage(None, folder, "s") as storage:
        opened = optuna.create_study(storage=storage, study_name="s")
        opened.set_user_attr("a", {"b": [1]})
        for value in (0.0, 1.0):
            template = optuna.create_trial(
                value=value, params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}
            )
            opened.add_trial(template)
    return (folder / "s.journal").read_bytes()


@FUZZ
@given(st.data())
def test_a_journal(tmp_path_factory, journal, data):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzzed.journal"
    path.write_bytes(data.draw(st.binary(max_size=99) | changed(journal)))
    for read in (
        lambda: read_study("fuzzed", folder),
        lambda: check_storage(None, folder, "fuzzed"),
    ):
        with bounded():
            read()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A tiny model, and the folder, config and weights of an adapter for it."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    config["task_type"] = "CAUSAL_LM"
    model = load_tiny_model(save_tiny_model(folder / "model", tiny_llama())).model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # between PEFT and transformers
        peft.get_peft_model(model, peft.LoraConfig(**config)).save_pretrained(folder / "a")
    weights = (folder / "a" / "adapter_model.safetensors").read_bytes()
    return folder, json.loads((folder / "a" / "adapter_config.json").read_text()), weights


@settings(FUZZ, max_examples=FUZZ.max_examples // 2)
@given(st.data())
def test_an_adapter(adapter, data):
    folder, config, weights = adapter
    if data.draw(st.booleans()):
        weights = data.draw(changed(weights))
    else:
        config = data.draw(with_changes(config))
    (folder / "a" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "a" / "adapter_model.safetensors").write_bytes(weights)
    base = load_tiny_model(folder / "model").model
    with bounded():
        check_adapter(folder / "a")
        adapter_base(folder / "a")
        with_adapter(base, folder / "a", "base")


@FUZZ
@given(st.dictionaries(st.sampled_from(["trial", "format", "base", "files", "settings"]), JSON))
def test_a_reproduction_file(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with bounded(), pytest.raises(HereticKLError) as raised:
        read_reproduction(path)
    assert str(raised.value).isprintable()


TEXT = [Document(" ".join(WORDS[:9]), "a"), Document(" ".join(WORDS[5:20]), "b")]
ASKED = [Prompt("make a cake", category="a"), Prompt("wait please", category="b")]
WINDOWS = {"context": 8, "stride": 4}
DTYPES = (torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16)


def load_text(path):
    return TextKL.load(path, TEXT, **WINDOWS)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The files of references, how each is loaded, and a candidate with its tokenizer."""
    folder = tmp_path_factory.mktemp("stored")
    model = save_tiny_model(folder / "model", tiny_llama())
    options = {"kl_tokens": 3, "bands": True, "refusal_openers": [5]}
    files = {}
    for kl, load in (
        (TeacherForcedKL(model, prompts=ASKED, **options), TeacherForcedKL.load),
        (TextKL(model, TEXT, **WINDOWS), load_text),
    ):
        for store in ("hidden", "head", "logits"):
            path = folder / f"{len(files)}.safetensors"
            kl.save(path, store=store)
            files[path] = load
    return files, load_tiny_model(model).model


@settings(FUZZ, max_examples=2 * FUZZ.max_examples)
@given(st.data())
def test_bytes_of_a_stored_reference(tmp_path_factory, stored, data):
    whole = data.draw(st.sampled_from(sorted(stored[0])))
    path = tmp_path_factory.getbasetemp() / "bytes.safetensors"
    path.write_bytes(data.draw(changed(whole.read_bytes())))
    is_measured(stored, whole, path)


def one_value(tensor, place, value):
    flat = tensor.flatten().clone()
    flat[place % flat.numel()] = value
    return flat.reshape(tensor.shape)


TENSOR_CHANGES = {
    "one value": one_value,
    "one value for all": lambda tensor, place, value: torch.full_like(tensor, value),
    "another type": lambda tensor, place, value: tensor.to(DTYPES[place % len(DTYPES)]),
    "a dimension less": lambda tensor, place, value: tensor.flatten(),
    "a dimension more": lambda tensor, place, value: tensor[None],
    "turned around": lambda tensor, place, value: tensor.permute(*range(tensor.dim())[::-1]),
    "cut": lambda tensor, place, value: tensor[:-1],
    "narrower": lambda tensor, place, value: tensor[..., 1:],
    "empty": lambda tensor, place, value: tensor[..., :0],
    "gone": lambda tensor, place, value: None,
}


@st.composite
def with_other_tensors(draw, whole):
    """Tensors of which some are of another type, another shape, other values or gone."""
    tensors = dict(whole)
    for name in draw(st.sets(st.sampled_from(sorted(whole)), min_size=1, max_size=2)):
        change = TENSOR_CHANGES[draw(st.sampled_from(sorted(TENSOR_CHANGES)))]
        value = torch.tensor(draw(st.sampled_from([0.0, -1.0, 7.5, 1e9, 1e39, float("nan")])))
        value = value.to(tensors[name].dtype).item()
        tensors[name] = change(tensors[name], draw(st.integers(0, 999)), value)
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@settings(FUZZ, max_examples=2 * FUZZ.max_examples)
@given(st.data())
def test_parts_of_a_stored_reference(tmp_path_factory, stored, data):
    whole = data.draw(st.sampled_from(sorted(stored[0])))
    tensors, facts = load_tensors(whole, REFERENCE_KIND)
    head, _ = load_tensors(whole, REFERENCE_KIND, "head")
    tensors |= {f"head.{name}": part for name, part in head.items()}
    if data.draw(st.booleans()):
        tensors = data.draw(with_other_tensors(tensors))
    else:
        facts = data.draw(with_changes(facts))
    path = tmp_path_factory.getbasetemp() / "parts.safetensors"
    save_tensors(path, REFERENCE_KIND, tensors, facts)
    is_measured(stored, whole, path)


def is_measured(stored, whole, path):
    """A candidate is measured from a changed file, or there is an error of one line."""
    files, model = stored
    with bounded():
        files[whole](path).score(model, tiny_tokenizer()).to_dict(worst=2)
