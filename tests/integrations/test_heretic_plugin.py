"""The plug-in file, loaded by path as Heretic does, beside stand-ins of Heretic's classes."""

import importlib.util
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from pydantic import BaseModel

from heretic_kl.errors import HereticKLError, MeasurementError, ScorerError
from heretic_kl.integrations import HERETIC_PLUGIN
from heretic_kl.prompts import Prompt
from heretic_kl.score import TeacherForcedKL
from heretic_kl.testing import save_tiny_model, tiny_llama, tiny_tokenizer

FILE, CLASS = HERETIC_PLUGIN.rsplit(":", 1)
USERS = ("make a cake", "tell me about Rome", "wait please")


@dataclass
class Score:
    value: float
    rich_display: str
    md_display: str


class DatasetSpecification(BaseModel):
    dataset: str
    split: str
    column: str


class HubDataset(BaseModel, extra="forbid"):
    dataset: str
    split: str
    column: str


class FileDataset(BaseModel, extra="forbid"):
    path: str


class Scorer:
    def __init__(self, settings):
        self.settings = settings


class NewerScorer(Scorer):
    @property
    def reproducible(self):
        raise NotImplementedError


class Context:
    def __init__(self, model):
        self._model = model

    def load_prompts(self, specification):
        assert specification.dataset
        return [SimpleNamespace(system="", user=user) for user in USERS]


class NewerContext:
    """Offers its model by a method and keeps it elsewhere."""

    def __init__(self, model):
        self._heretic = model

    def get_model(self):
        return self._heretic

    load_prompts = Context.load_prompts


OLDER = (DatasetSpecification, Context, Scorer)
NEWER = (HubDataset | FileDataset, NewerContext, NewerScorer)


def load_file():
    """As a loader of plug-ins does: by path, under no name that could be imported."""
    spec = importlib.util.spec_from_file_location("heretic_plugin_by_path", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=[OLDER, NEWER], ids=["older", "newer"])
def plugin(monkeypatch, request):
    specification, context_class, scorer_class = request.param
    parts = {
        "heretic": {},
        "heretic.config": {"DatasetSpecification": specification},
        "heretic.plugin": {"Context": context_class},
        "heretic.scorer": {"Score": Score, "Scorer": scorer_class},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return load_file()


@pytest.fixture
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_llama())


def adapted(folder):
    """A tiny model under a LoRA that changes nothing yet, as Heretic holds one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=1, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        # PEFT asks the model a question that transformers has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def edit(model, size=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(size * torch.randn(weight.shape, generator=generator))


def context(plugin, model, prefix=""):
    settings = SimpleNamespace(response_prefix=prefix)
    return plugin.Context(
        SimpleNamespace(model=model, tokenizer=tiny_tokenizer(), settings=settings)
    )


def heretic(ctx):
    return ctx.get_model() if hasattr(ctx, "get_model") else ctx._model


def scorer(plugin, **settings):
    made = getattr(plugin, CLASS)(plugin.TeacherForcedKLSettings(**settings))
    assert "__init__" not in vars(type(made))
    assert type(made).__annotations__["settings"] is plugin.TeacherForcedKLSettings
    return made


def test_the_unedited_model_is_exactly_zero_and_an_edited_one_is_not(plugin, folder):
    model = adapted(folder)
    edit(model)  # init comes before any edit in Heretic; its reference must not depend on that
    ctx = context(plugin, model)
    made = scorer(plugin)
    made.init(ctx)
    found = made.get_score(ctx)
    assert found.value > 0.0 and "±" in found.rich_display == found.md_display
    assert made.get_baseline_score(ctx).value == 0.0
    edit(model, size=0.0)
    assert made.get_score(ctx).value == 0.0
    assert made.score_name == "KL over 3 tokens" and made.reproducible is True


def test_it_measures_what_teacher_forced_kl_measures(plugin, folder):
    model = adapted(folder)
    ctx = context(plugin, model, prefix=" sure")
    made = scorer(plugin, kl_tokens=4, divergence="reverse_kl", temperature=2.0, batch_size=2)
    made.init(ctx)
    edit(model)
    expected = TeacherForcedKL(
        folder,
        prompts=[Prompt(user) for user in USERS],
        kl_tokens=4,
        divergence="reverse_kl",
        temperature=2.0,
        batch_size=2,
        response_prefix=" sure",
        dtype="float32",
    ).score(model)
    # Weights that the measurement packs are summed in another order.
    assert made.get_score(ctx).value == pytest.approx(expected.kl, rel=1e-5)
    assert expected.kl > 0.0


def test_a_model_that_heretic_replaced_is_the_one_measured(plugin, folder):
    ctx = context(plugin, adapted(folder))
    made = scorer(plugin)
    made.init(ctx)
    edit(heretic(ctx).model)
    assert made.get_score(ctx).value > 0.0
    heretic(ctx).model = adapted(folder)
    assert made.get_score(ctx).value == 0.0


def test_an_infinite_kl_is_an_error(plugin, folder):
    ctx = context(plugin, adapted(folder))
    made = scorer(plugin, noise_floor=False)
    made.init(ctx)
    whole = made._kl.score(heretic(ctx).model)
    some = replace(whole, summary=replace(whole.summary, infinite_count=2))
    made._kl = SimpleNamespace(score=lambda model: some)
    with pytest.raises(MeasurementError, match="infinite: at 2 of 9 positions"):
        made.get_score(ctx)


def test_a_heretic_of_another_shape_is_named(plugin, folder):
    made = scorer(plugin)
    with pytest.raises(ScorerError, match=r"no ctx\.(_model|get_model\(\))\.model"):
        made.init(plugin.Context(None))
    without = SimpleNamespace(model=adapted(folder), tokenizer=tiny_tokenizer(), settings=None)
    with pytest.raises(ScorerError, match=r"no ctx\..*\.settings\.response_prefix"):
        made.init(plugin.Context(without))


def test_models_without_adapters_are_measured_as_they_are(plugin, folder):
    from transformers import AutoModelForCausalLM

    ctx = context(plugin, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    made = scorer(plugin)
    made.init(ctx)
    assert made.get_score(ctx).value == 0.0


def test_wrong_settings_are_refused(plugin):
    with pytest.raises(ValueError, match="kl_tokens"):
        plugin.TeacherForcedKLSettings(kl_tokens=0)
    assert plugin.TeacherForcedKLSettings().prompts.split == "test[:100]"


def test_without_heretic_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "heretic", None)
    with pytest.raises(HereticKLError, match="newer than 1.4.0") as caught:
        load_file()
    assert isinstance(caught.value, ImportError)
    assert HERETIC_PLUGIN in str(caught.value) and "\n" not in str(caught.value)


def test_the_file_is_found_without_heretic():
    run = subprocess.run(
        [sys.executable, "-m", "heretic_kl.integrations"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout == HERETIC_PLUGIN + "\n"
