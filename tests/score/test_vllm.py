"""Candidates in vLLM itself where it is installed, else in a stand-in for its interface."""

import importlib.util
import json
import os
import sys
import warnings
import weakref
from copy import deepcopy
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from heretic_kl.cli import main as cli
from heretic_kl.cli.score.chain_cells import chain_cells
from heretic_kl.errors import MeasurementError, ModelError
from heretic_kl.score import TeacherForcedKL, measure_chain, reference_run
from heretic_kl.score.vllm.model import SURROUNDINGS, VLLMModel
from heretic_kl.testing import save_tiny_model, tiny_llama

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake"]
INSTALLED = importlib.util.find_spec("vllm") is not None
pytestmark = pytest.mark.filterwarnings(*(["ignore"] if INSTALLED else ["error"]))
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""vLLM's attention takes heads of 32 and more."""


class Engine:
    """What of `vllm.LLM` is used: a model, and log-probabilities of a prompt's tokens."""

    shift, scale = 0.0, 1.0
    rows = 0
    ignores_adapters = False
    asked: list = []  # noqa: RUF012

    def __init__(self, name, *, dtype, max_model_len, enable_lora=False, **options):
        from transformers import AutoModelForCausalLM

        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        if "broken" in name:
            raise ValueError("first line\nno such architecture: Broken")
        self.length, self.lora, self.name = max_model_len, enable_lora, name
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        self.model.lm_head.weight.data *= self.scale
        self.head = SimpleNamespace(compute_logits=self.model.lm_head)
        self.model_config = SimpleNamespace(
            dtype=torch.float32, quantization=None, get_vocab_size=self._size
        )
        core = SimpleNamespace(shutdown=lambda: None)
        self.llm_engine = SimpleNamespace(engine_core=core)
        Engine.asked.append((dtype, options))

    def _size(self):
        return self.model.config.vocab_size

    def apply_model(self, function):
        return [function(self.head)]

    @torch.no_grad()
    def generate(self, prompts, params, *, use_tqdm, lora_request):
        [tokens] = [prompt["prompt_token_ids"] for prompt in prompts]
        assert len(tokens) + params.max_tokens <= self.length
        model = self.model
        if lora_request is not None and not self.ignores_adapters:
            from peft import PeftModel

            assert self.lora
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = PeftModel.from_pretrained(deepcopy(model), lora_request.path).model
        hidden = model.model(torch.tensor([tokens])).last_hidden_state[0]
        self.head.compute_logits(hidden[-1:])
        logits = self.head.compute_logits(hidden[self.rows : -1]).log_softmax(-1)
        logits = model.lm_head(hidden).log_softmax(-1) + self.shift
        entries = [
            {token: SimpleNamespace(logprob=float(row[token]))}
            for token, row in zip(tokens[1:], logits, strict=False)
        ]
        return [SimpleNamespace(prompt_logprobs=[None, *entries])]


@pytest.fixture(scope="module", autouse=True)
def vllm():
    """The stand-in, unless vLLM is there."""
    if INSTALLED:
        yield
        return
    package, lora, request = (ModuleType(name) for name in ("vllm", "vllm.lora", "request"))
    state = ModuleType("vllm.distributed.parallel_state")
    package.LLM, package.SamplingParams = Engine, SimpleNamespace
    request.LoRARequest = lambda name, number, path: SimpleNamespace(path=path)
    state.cleanup_dist_env_and_memory = lambda: None
    package.__spec__ = importlib.util.spec_from_loader("vllm", loader=None)
    modules = {"vllm": package, "vllm.lora": lora, "vllm.lora.request": request}
    modules |= {"vllm.distributed": ModuleType("distributed"), state.__name__: state}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    for seed, name in enumerate(("original", "other")):
        save_tiny_model(folder / name, tiny_llama(**SIZES), seed=seed)
    return folder


@pytest.fixture
def built(models):
    def make(**changes):
        options = {"prompts": PROMPTS, "kl_tokens": 4, "dtype": "float32", "device": "cpu"}
        return TeacherForcedKL(models / "original", backend="vllm", **{**options, **changes})

    return make


class TestValues:
    def test_they_are_those_of_transformers(self, built, models, load):
        kl = built()
        here, there = kl.score(models / "other"), kl.score(load(models / "other"))
        assert here.kl > 0.01
        assert torch.allclose(here.table.values, there.table.values, rtol=1e-3, atol=1e-6)
        assert torch.equal(here.table.top1_agreement, there.table.top1_agreement)
        assert here.candidate_dtype == "float32, vLLM"
        assert here.back_end_floor < 1e-6

    def test_the_original_is_at_the_floor(self, built, models):
        assert built().score(models / "original").kl < 1e-6

    def test_without_a_floor_transformers_is_not_run(self, built, models):
        assert built(noise_floor=False).score(models / "other").back_end_floor is None

    def test_a_chain_through_it(self, built, models):
        steps = [models / "other", models / "original"]
        kl = built()
        chain = measure_chain(kl, steps, [kl.score(step) for step in steps])
        there, back = (chain.pairs[index].measurement.kl for index in (0, 2))
        assert chain.whole.kl < 1e-6 < 0.01 < min(there, back)

    def test_in_the_middle_of_a_chain_logits_are_whole_where_they_fit(
        self, built, models, monkeypatch
    ):
        kl, notices = built(), []
        kl._run.notify = notices.append
        steps = [models / "other", models / "other"]
        measured = [kl.score(step) for step in steps]
        step = measure_chain(kl, steps, measured).pairs[2]
        assert step.measurement.kl == 0.0 and not step.rounded and not notices
        size = kl.reference.rows * kl.reference.identity.vocabulary_size
        free = "heretic_kl.score.vllm.candidate.free_memory"
        monkeypatch.setattr(free, lambda device: 2 * size)
        chain = measure_chain(kl, steps, measured)
        step = chain.pairs[2]
        assert 0.0 < step.measurement.kl < 1e-6 and step.rounded
        assert step.measurement.reference_dtype == "float32, vLLM, held as float16"
        assert len(notices) == 1 and "held as float16: as float32 they take" in notices[0]
        assert chain_cells(chain)[3][1] == "candidate 1, as float16"
        monkeypatch.setattr(free, lambda device: 2 * size - 1)
        with pytest.raises(MeasurementError, match="GB even as float16, and .* measure fewer"):
            measure_chain(kl, steps, measured)

    def test_of_a_chain_the_logits_of_one_model_are_held(self, built, models, monkeypatch):
        held, real = [], reference_run.reference_in_vllm

        def watched(*words, **options):
            assert [logits() for logits in held] == [None] * len(held)
            seen = real(*words, **options)
            held.append(weakref.ref(seen.logits.logits))
            return seen

        monkeypatch.setattr(reference_run, "reference_in_vllm", watched)
        kl = built(noise_floor=False)
        steps = [models / name for name in ("other", "original", "other", "original")]
        chain = measure_chain(kl, steps, [kl.score(step) for step in steps])
        assert len(held) == 3 and len(chain.pairs) == 10

    def test_the_users_surroundings_are_left_alone(self, built, models, monkeypatch):
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        before = {name: os.environ.get(name) for name in SURROUNDINGS}
        built(noise_floor=False).score(models / "other")
        assert {name: os.environ.get(name) for name in SURROUNDINGS} == before


class TestAdapters:
    def test_one_is_put_on_its_base(self, built, models, make_adapter):
        adapter = make_adapter(models / "original", base=str(models / "original"))
        kl = built()
        here = kl.score(adapter)
        kl._run.loader.backend = "transformers"
        assert here.kl == pytest.approx(kl.score(adapter).kl, rel=1e-3)
        assert here.kl > 1e-4

    def test_in_a_chain_it_is_put_on_the_same_base(self, built, models, make_adapter):
        adapter = make_adapter(models / "original", base=str(models / "original"))
        kl, base = built(noise_floor=False), models / "other"
        for backend in ("vllm", "transformers"):
            kl._run.loader.backend = backend
            measured = [kl.score(adapter, base=base)] * 2
            chain = measure_chain(kl, [adapter, adapter], measured, base=base)
            assert chain.pairs[2].measurement.kl == 0.0 < 0.01 < measured[0].kl

    def test_one_that_changes_nothing_is_refused(self, built, models, make_adapter):
        adapter = make_adapter(models / "original", base=str(models / "original"), random=False)
        if INSTALLED:  # which refuses nothing: the adapter's second matrix is zero
            file = adapter / "adapter_model.safetensors"
            save_file({key: 0 * value for key, value in load_file(file).items()}, file)
        with pytest.raises(MeasurementError, match="vLLM ignores the adapter, or it changes"):
            built(noise_floor=False).score(adapter)

    @pytest.mark.skipif(INSTALLED, reason="vLLM does not ignore it")
    def test_one_that_is_ignored_is_refused(self, built, models, make_adapter, monkeypatch):
        monkeypatch.setattr(Engine, "ignores_adapters", True)
        adapter = make_adapter(models / "original", base=str(models / "original"))
        with pytest.raises(MeasurementError, match="vLLM ignores the adapter"):
            built(noise_floor=False).score(adapter)


@pytest.mark.skipif(INSTALLED, reason="of the stand-in")
class TestChecks:
    def test_logits_of_other_tokens_are_refused(self, built, models, monkeypatch):
        monkeypatch.setattr(Engine, "rows", 1)
        with pytest.raises(MeasurementError, match=r"vLLM computed logits of \d+ tokens of '.*"):
            built(noise_floor=False).score(models / "other")

    def test_log_probabilities_of_other_logits_are_refused(self, built, models, monkeypatch):
        monkeypatch.setattr(Engine, "shift", 0.1)
        with pytest.raises(MeasurementError, match="are not those of its logits"):
            built(noise_floor=False).score(models / "other")

    def test_logits_that_are_not_numbers_are_the_models_fault(self, built, models, monkeypatch):
        monkeypatch.setattr(Engine, "scale", float("nan"))
        with pytest.raises(MeasurementError, match="NaN"):
            built(noise_floor=False).score(models / "other")

    def test_a_stored_reference_without_a_head_is_refused_before_loading(
        self, built, models, tmp_path
    ):
        built().save(tmp_path / "stored.safetensors")
        Engine.asked.clear()
        stored = TeacherForcedKL.load(tmp_path / "stored.safetensors", backend="vllm")
        with pytest.raises(MeasurementError, match="--store head"):
            stored.score(models / "other")
        assert Engine.asked == []

    def test_what_vllm_cannot_load_is_one_line(self, models):
        broken = save_tiny_model(models / "broken", tiny_llama(**SIZES))
        with pytest.raises(ModelError, match=r"^vLLM cannot load '.*': no such architecture: B.*$"):
            VLLMModel(str(broken), context=8)

    def test_the_dtype_is_the_references_but_for_quantized_weights(
        self, built, models, monkeypatch
    ):
        def noted(engine, name, *, dtype, **options):
            Engine.asked.append((dtype, options))
            raise ValueError("only its dtype was wanted")

        quantized = save_tiny_model(models / "quantized", tiny_llama(**SIZES))
        config = json.loads((quantized / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "awq"}
        kl = built(noise_floor=False, dtype="auto")
        Engine.asked.clear()
        kl.score(models / "other")
        (quantized / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(Engine, "__init__", noted)
        with pytest.raises(ModelError, match="only its dtype was wanted"):
            kl.score(quantized)
        assert [dtype for dtype, _ in Engine.asked] == ["float32", "auto"]

    @pytest.mark.parametrize("dtype", [None, "bfloat16"])
    def test_in_a_chain_it_is_the_same_for_every_model(self, built, models, dtype):
        kl, steps = built(noise_floor=False, dtype="auto"), [models / "other"] * 3
        measured = [kl.score(step, dtype=dtype) for step in steps]
        Engine.asked.clear()
        measure_chain(kl, steps, measured, dtype=dtype)
        used = [asked for asked, _ in Engine.asked]
        assert used == [dtype or kl.reference_dtype] * 5  # two in the middle, three after them
        kl._run.loader.backend = "transformers"
        seen = kl.seen_by(steps[0], dtype=dtype)
        assert seen.score(steps[0]).candidate_dtype == (dtype or kl.reference_dtype)


class TestCommand:
    def test_measured_by_a_flag(self, models, tmp_path):
        file = tmp_path / "out.json"
        words = ["--reference", str(models / "original"), "--candidate", str(models / "other")]
        words += ["--prompts", str(self.prompts(tmp_path)), "--backend", "vllm"]
        assert cli.main(["score", *words, "--dtype", "float32", "--json-file", str(file)]) == 0
        [candidate] = json.loads(file.read_text())["candidates"]
        assert candidate["candidate_dtype"] == "float32, vLLM"

    def test_another_tokenizer_is_refused(self, models, stranger, tmp_path, capsys):
        words = ["--reference", str(models / "original"), "--candidate", str(stranger)]
        words += ["--prompts", str(self.prompts(tmp_path)), "--backend", "vllm"]
        assert cli.main(["score", *words]) == 1
        assert "another tokenizer" in capsys.readouterr().err

    def test_without_vllm_it_says_how_to_get_it(self, models, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("heretic_kl.score.vllm.model.find_spec", lambda name: None)
        words = ["--reference", str(models / "original"), "--candidate", str(models / "other")]
        words += ["--prompts", str(self.prompts(tmp_path)), "--backend", "vllm"]
        assert cli.main(["score", *words]) != 0
        assert "install heretic-kl[vllm]" in capsys.readouterr().err

    @staticmethod
    def prompts(folder):
        file = folder / "prompts.txt"
        file.write_text("\n".join(PROMPTS))
        return file
