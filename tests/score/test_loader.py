"""What a name stands for: models, adapters and their bases, tokenizers; what is refused early."""

import json
import struct

import pytest

from heretic_kl.errors import MeasurementError, ModelError, UnsupportedModelError
from heretic_kl.score import TeacherForcedKL, check_models
from heretic_kl.testing import save_tiny_model, tiny_llama

PROMPTS = ["make a cake", "tell me about Rome", "wait please"]


@pytest.fixture
def kl(original):
    told: list[str] = []
    made = TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=3, notify=told.append)
    made.told = told
    return made


class TestAdapters:
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_one_is_put_on_what_it_names(self, kl, other, make_adapter, load):
        from peft import PeftModel

        adapter = make_adapter(other, str(other))
        merged = PeftModel.from_pretrained(load(other), str(adapter))
        assert kl.score(adapter).kl == kl.score(merged).kl != kl.score(other).kl
        assert kl.told == []

    def test_the_base_that_is_given_wins(self, kl, original, other, make_adapter):
        adapter = make_adapter(original, str(original))
        on_other = kl.score(adapter, base=other).kl
        assert on_other != kl.score(adapter).kl
        told = TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=3, base=str(other))
        assert told.score(adapter).kl == on_other

    def test_where_its_base_is_not_here_it_is_put_on_the_reference(
        self, kl, original, make_adapter
    ):
        adapter = make_adapter(original, "/gone/with/the/machine")
        elsewhere = kl.score(adapter).kl
        assert elsewhere == kl.score(adapter, base=original).kl > 0.0
        assert len(kl.told) == 1 and "which is not available: it is put on" in kl.told[0]

    def test_one_that_names_no_base_is_put_on_the_reference(self, kl, original, make_adapter):
        assert kl.score(make_adapter(original)).kl > 0.0
        assert len(kl.told) == 1 and "names no base: it is put on" in kl.told[0]

    def test_an_adapter_may_be_the_reference(self, original, make_adapter):
        adapter = make_adapter(original, str(original))
        kl = TeacherForcedKL(adapter, prompts=PROMPTS, kl_tokens=3)
        assert kl.score(adapter).kl == 0.0 < kl.score(original).kl

    def test_a_reference_without_a_base(self, original, make_adapter):
        adapter = make_adapter(original)
        with pytest.raises(ModelError, match="names no base model: give .*--base"):
            TeacherForcedKL(adapter, prompts=PROMPTS)
        kl = TeacherForcedKL(adapter, prompts=PROMPTS, kl_tokens=3, base=original)
        assert kl.score(adapter).kl == 0.0

    def test_one_that_does_nothing_measures_zero(self, kl, original, make_adapter):
        assert kl.score(make_adapter(original, str(original), random=False)).kl == 0.0

    def test_pickled_weights_are_not_read(self, kl, original, make_adapter):
        adapter = make_adapter(original, str(original))
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        with pytest.raises(UnsupportedModelError, match="pickled weights are not read"):
            kl.score(adapter)

    def test_learned_prompts_are_refused(self, kl, original, make_adapter):
        adapter = make_adapter(original, str(original), kind="prompt")
        with pytest.raises(UnsupportedModelError, match="PROMPT_TUNING.*learned tokens"):
            kl.score(adapter)

    def test_weights_that_are_missing_do_not_pass_for_no_edit(self, kl, original, make_adapter):
        adapter = make_adapter(original, str(original))
        file = adapter / "adapter_config.json"
        stated = json.loads(file.read_text())
        file.write_text(json.dumps({**stated, "target_modules": ["q_proj", "k_proj"]}))
        with pytest.raises(UnsupportedModelError, match="lacks weights"):
            kl.score(adapter)

    def test_one_of_another_model_does_not_fit(self, kl, original, make_adapter, tmp_path):
        deeper = tiny_llama(hidden_size=64, intermediate_size=96)
        save_tiny_model(tmp_path / "deeper", deeper)
        with pytest.raises(UnsupportedModelError, match="does not fit"):
            kl.score(make_adapter(tmp_path / "deeper"), base=original)


class TestPreflight:
    def test_what_can_be_measured_passes(self, original, other, make_adapter):
        check_models(original, [other, make_adapter(original, str(original))])
        check_models(original, [make_adapter(original, "/gone", name="second")])

    def test_a_stored_reference_is_checked_by_its_tokenizer(self, kl, other, stranger):
        check_models(kl.reference, [other])
        with pytest.raises(MeasurementError, match="another tokenizer"):
            check_models(kl.reference, [stranger])

    def test_one_without_its_head_is_refused_early(self, kl, original, tmp_path, monkeypatch):
        monkeypatch.setattr("heretic_kl.score.loader.require_vllm", lambda: None)
        kl.save(tmp_path / "r.safetensors")
        file = tmp_path / "x.gguf"
        file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 0))
        for candidate, backend in (
            (file, "llama.cpp"),
            (original, "vllm"),
            ("http://localhost:1/v1#m", "auto"),
        ):
            with pytest.raises(MeasurementError, match="--store head"):
                check_models(kl.reference, [candidate], head=False, backend=backend)
        check_models(kl.reference, [file], backend="llama.cpp")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors", backend="llama.cpp")
        with pytest.raises(MeasurementError, match="--store head"):
            stored.score(file)  # before it is opened

    def test_an_adapter_on_an_adapter(self, original, make_adapter):
        adapter = make_adapter(original, str(original))
        with pytest.raises(UnsupportedModelError, match="is an adapter itself"):
            check_models(original, [adapter], base=adapter)

    def test_a_base_that_is_not_to_be_found(self, kl, original, make_adapter, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        adapter = make_adapter(original, "no-such-org/no-such-model")
        with pytest.raises(ModelError, match="names 'no-such-org.*give one with --base"):
            check_models(kl.reference, [adapter])

    def test_a_folder_without_weights_or_with_pickles(self, original, tmp_path):
        folder = save_tiny_model(tmp_path / "m", tiny_llama())
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(UnsupportedModelError, match="no safetensors weights"):
            check_models(original, [folder])

    def test_no_such_model(self, original):
        with pytest.raises(ModelError, match="no model at"):
            check_models(original, ["./no/such/model"])

    def test_a_broken_adapter_config(self, original, make_adapter):
        adapter = make_adapter(original, str(original))
        (adapter / "adapter_config.json").write_text("{")
        with pytest.raises(ModelError, match="cannot read"):
            check_models(original, [adapter])


def test_a_checkpoint_without_a_tokenizer_is_taken_to_have_the_reference_s(kl, tmp_path):
    folder = save_tiny_model(tmp_path / "m", tiny_llama(), seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert kl.score(folder).kl > 0.0
    assert len(kl.told) == 1 and "has no tokenizer" in kl.told[0]
