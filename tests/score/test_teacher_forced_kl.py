"""The stand-alone measurement, on tiny random models."""

import gc
import weakref

import pytest
import torch

from heretic_kl.errors import MeasurementError, PromptError, UnsupportedModelError
from heretic_kl.kl import KLSummary, KLTable
from heretic_kl.prompts import Prompt
from heretic_kl.score import Measurement, TeacherForcedKL
from heretic_kl.testing import save_tiny_model, tiny_llama, tiny_tokenizer

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake"]


def built(reference, **options):
    return TeacherForcedKL(reference, **{"prompts": PROMPTS, "kl_tokens": 4, **options})


class TestValues:
    def test_a_model_against_itself_is_exactly_zero(self, original):
        summary = built(original).score(original).summary
        assert summary.mean == 0.0 and summary.mean_probability_change == 0.0
        assert summary.standard_error == 0.0 and summary.interval == (0.0, 0.0)
        assert summary.median == 0.0 and all(q.value == 0.0 for q in summary.quantiles)
        assert summary.top1_agreement == 1.0 and summary.below_noise_floor
        assert summary.near_tie_share == 0.0 and summary.infinite_count == 0
        assert all(place.mean == 0.0 for place in summary.profile)

    @pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon"])
    def test_other_divergences_and_temperatures_are_zero_too(self, original, divergence):
        kl = built(original, divergence=divergence, temperature=0.7)
        summary = kl.score(original).summary
        assert (summary.mean, summary.divergence, summary.temperature) == (0.0, divergence, 0.7)

    def test_batch_sizes_agree(self, original, other):
        tables = [built(original, batch_size=n).score(other).table for n in (1, 3, 16)]
        for table in tables[1:]:
            assert torch.equal(table.mask, tables[0].mask)
            assert torch.allclose(table.values, tables[0].values, rtol=0.0, atol=1e-6)

    def test_reverse_swaps_the_models(self, original, other):
        forward = built(original, kl_tokens=1).score(other).kl
        reverse = built(other, kl_tokens=1, divergence="reverse_kl").score(original).kl
        assert forward == pytest.approx(reverse, rel=1e-9)

    def test_drawn_answers_depend_on_the_seed_alone(self, original):
        first, again, another = (built(original, response=f"sampled({seed})") for seed in (1, 1, 2))
        assert first.responses() == again.responses() != another.responses()
        assert first.responses() != built(original).responses()
        assert first.reference.identity.settings["responses"] == "sampled(1)"
        assert first.score(original).kl == 0.0

    def test_decay_weighs_the_mean_and_the_comparison(self, original, other, make_adapter):
        kl = built(original, position_decay=0.5)
        near, far = kl.score(make_adapter(original, str(original))), kl.score(other)
        pair = near.compare(far)
        assert pair.mean_difference == pytest.approx(near.kl - far.kl)
        assert near.position_decay == 0.5 and far.kl != built(original).score(other).kl

    def test_the_summary_survives_json(self, original, other):
        import json

        found = built(original).score(other)
        plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert plain["rounding_floor"] == found.noise_floor.rounding > 0.0
        assert plain["reference_dtype"] == plain["candidate_dtype"] == "float32"
        own = {name: plain[name] for name in KLSummary.__dataclass_fields__}
        assert KLSummary.from_dict(own) == found.summary

    def test_categories_are_shown_apart(self, original, other):
        prompts = [Prompt(text, category="ab"[n % 2]) for n, text in enumerate(PROMPTS)]
        measured = built(original, prompts=prompts).score(other)
        assert [(group.name, group.clusters) for group in measured.groups] == [("a", 2), ("b", 2)]
        of_a = built(original, prompts=PROMPTS[::2]).score(other).kl
        assert measured.groups[0].mean == pytest.approx(of_a, rel=1e-4)
        assert "profile" in measured.to_dict() and measured.macro_average.mean == pytest.approx(
            sum(group.mean for group in measured.groups) / 2
        )
        some = [*prompts, Prompt("sorry")]
        assert built(original, prompts=some).score(other).groups == ()

    def test_no_floor_if_none_is_wanted(self, original, other):
        found = built(original, noise_floor=False).score(other)
        assert found.noise_floor is None and found.summary.noise_floor is None


class TestModels:
    def test_objects_and_paths_measure_alike_and_models_stay_as_they_were(
        self, original, other, load
    ):
        candidate = load(other).train()
        candidate.model.layers[0].eval()
        by_object = built(load(original), tokenizer=tiny_tokenizer())
        assert by_object.score(candidate).kl == built(original).score(other).kl > 0.0
        assert candidate.training and all(p.requires_grad for p in candidate.parameters())
        assert not candidate.model.layers[0].training

    def test_a_reference_survives_changes_of_its_model(self, original, load):
        model = load(original)
        kl = built(model, tokenizer=tiny_tokenizer())
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        assert kl.score(model).kl > 0.0
        assert kl.score(original).kl == 0.0

    def test_a_model_is_probed_once(self, original, other, load, monkeypatch):
        from heretic_kl.model.loading import adopt

        probed: list[object] = []
        real = adopt.find_capabilities

        def counted(lm):
            probed.append(lm)
            return real(lm)

        kl, candidate, second = built(original), load(other), load(other)
        monkeypatch.setattr(adopt, "find_capabilities", counted)
        before = kl.score(candidate).kl
        with torch.no_grad():  # what the weights are is read again each time
            candidate.lm_head.weight.mul_(1.5)
        assert kl.score(candidate).kl != before == kl.score(second).kl
        assert len(probed) == 2
        del probed[:]
        weak = weakref.ref(candidate)
        del candidate
        gc.collect()
        assert weak() is None

    def test_training_mode_comes_back_when_measuring_fails(self, original, load, monkeypatch):
        kl, candidate = built(original), load(original).train()
        with torch.no_grad():
            candidate.lm_head.weight.fill_(float("nan"))
        with pytest.raises((MeasurementError, UnsupportedModelError)):
            kl.score(candidate)
        assert candidate.training

    def test_no_two_models_are_in_memory(self, original, other, make_adapter, monkeypatch):
        from heretic_kl.score import loader

        alive: list[weakref.ref] = []
        real = loader.load_to_measure

        def watched(*words, **options):
            assert [model() for model in alive] == [None] * len(alive)
            model = real(*words, **options)
            alive.append(weakref.ref(model))
            return model

        monkeypatch.setattr(loader, "load_to_measure", watched)
        kl = built(original)
        for candidate in (other, make_adapter(original, str(original)), original):
            kl.score(candidate)
        assert len(alive) == 4
        gc.collect()
        assert [model() for model in alive] == [None] * 4

    def test_candidates_take_the_reference_s_dtype_unless_told(self, original):
        kl = built(original, dtype="bfloat16")
        assert kl.score(original).candidate_dtype == "bfloat16"
        found = kl.score(original, dtype="float32")
        assert (found.reference_dtype, found.candidate_dtype) == ("bfloat16", "float32")
        assert found.kl > 0.0

    def test_a_stored_reference_s_dtype_counts_too(self, original, tmp_path):
        built(original, dtype="bfloat16").save(tmp_path / "r.safetensors")
        found = TeacherForcedKL.load(tmp_path / "r.safetensors").score(original)
        assert found.candidate_dtype == "bfloat16" and found.kl == 0.0

    def test_a_missing_chat_template_is_said(self, tmp_path):
        folder = save_tiny_model(tmp_path / "bare", tiny_llama())
        (folder / "chat_template.jinja").unlink()
        told: list[str] = []
        built(folder, notify=told.append)
        assert told == ["the reference has no chat template: prompts are given as plain text"]


class TestMistakes:
    @pytest.mark.parametrize(
        "options", [{"kl_tokens": 0}, {"temperature": 0.0}, {"position_decay": 1.5}]
    )
    def test_numbers_out_of_range(self, original, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            built(original, **options)

    def test_no_prompts(self, original):
        with pytest.raises(PromptError, match="no prompts"):
            built(original, prompts=[])

    def test_an_object_without_a_tokenizer(self, original, load):
        with pytest.raises(ValueError, match="needs its tokenizer"):
            built(load(original))

    def test_another_tokenizer_is_named_by_its_hash(self, original, stranger):
        kl = built(original)
        own = kl.reference.identity.tokenizer_hash[:12]
        with pytest.raises(MeasurementError, match=f"another tokenizer \\(reference '{own}'"):
            kl.score(stranger)

    def test_a_candidate_that_fits_in_smaller_batches_only(self, original, other, monkeypatch):
        from heretic_kl.engine import runner

        told: list[str] = []
        kl = built(original, batch_size=4, notify=told.append)
        real = runner.forced_portions

        def short_of_memory(lm, batches):
            if batches.max_rows > 2:
                raise torch.OutOfMemoryError
            return real(lm, batches)

        monkeypatch.setattr(runner, "forced_portions", short_of_memory)
        with pytest.raises(MeasurementError, match="measure both with batch size 2") as raised:
            kl.score(other)
        assert "\n" not in str(raised.value)
        assert told == ["out of memory: batch size is now 2"]

    def test_other_prompts_cannot_be_paired(self, original, other):
        found = built(original).score(other)
        fewer = built(original, prompts=PROMPTS[:2]).score(other)
        with pytest.raises(MeasurementError, match="cannot be paired"):
            found.compare(fewer)


class TestVocabularies:
    @pytest.fixture
    def padded(self, original, load, tmp_path):
        model = load(original)
        size = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(size + 8, mean_resizing=False)
        model.save_pretrained(tmp_path / "padded")
        tiny_tokenizer().save_pretrained(tmp_path / "padded")
        return tmp_path / "padded"

    def test_padding_of_the_head_is_left_out(self, original, padded):
        told: list[str] = []
        found = built(original, notify=told.append).score(padded)
        assert found.kl < 1e-12
        assert len(told) == 1 and "tokens are compared" in told[0]

    def test_a_stored_reference_cannot_be_cut(self, original, padded, tmp_path):
        for store in ("hidden", "logits"):
            built(original).save(tmp_path / "r.safetensors", store=store)
            with pytest.raises(MeasurementError, match="another vocabulary"):
                TeacherForcedKL.load(tmp_path / "r.safetensors").score(padded)


class TestStored:
    def test_hidden_states_measure_as_the_model_did(self, original, make_adapter, tmp_path):
        adapter = make_adapter(original, str(original))
        kl = built(original, divergence="reverse_kl", temperature=1.5, position_decay=0.8)
        kl.save(tmp_path / "r.safetensors")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors", tiny_tokenizer())
        assert same(stored.score(adapter), kl.score(adapter))
        assert stored.score(original).kl == 0.0
        assert stored.responses() == kl.responses() and stored.score(original).groups == ()
        kl = built(original, prompts=[Prompt(word, category=word[0]) for word in ("sorry", "wait")])
        kl.save(tmp_path / "c.safetensors")
        again = TeacherForcedKL.load(tmp_path / "c.safetensors").score(adapter)
        assert [group.name for group in again.groups] == ["s", "w"]
        assert again.groups == kl.score(adapter).groups
        assert stored.reference.identity.settings["model"] == "original"

    def test_logits_measure_any_head(self, original, other, tmp_path):
        kl = built(original)
        kl.save(tmp_path / "r.safetensors", store="logits")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors")
        assert stored.score(other).kl == pytest.approx(kl.score(other).kl, rel=1e-3)
        assert stored.score(original).kl < 1e-5
        stored.save(tmp_path / "again.safetensors", store="logits")

    def test_with_the_head_any_other_is_measured_as_the_model_did(self, original, other, tmp_path):
        kl = built(original)
        kl.save(tmp_path / "r.safetensors", store="head")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors")
        assert same(stored.score(other), kl.score(other))
        assert stored.score(original).kl == 0.0
        stored.save(tmp_path / "l.safetensors", store="logits")
        with pytest.raises(MeasurementError, match="head can only be stored where it is known"):
            TeacherForcedKL.load(tmp_path / "l.safetensors").save(tmp_path / "h", store="head")

    def test_hidden_states_refuse_another_head(self, original, other, tmp_path):
        built(original).save(tmp_path / "r.safetensors")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors")
        with pytest.raises(MeasurementError, match="another head .*--store head"):
            stored.score(other)
        with pytest.raises(MeasurementError, match="head is known"):
            stored.save(tmp_path / "l.safetensors", store="logits")

    def test_another_tokenizer_is_refused(self, original, stranger, tmp_path):
        built(original).save(tmp_path / "r.safetensors")
        with pytest.raises(MeasurementError, match="another tokenizer"):
            TeacherForcedKL.load(tmp_path / "r.safetensors").score(stranger)

    def test_answers_need_a_tokenizer(self, original, tmp_path):
        built(original).save(tmp_path / "r.safetensors")
        with pytest.raises(MeasurementError, match="pass its tokenizer"):
            TeacherForcedKL.load(tmp_path / "r.safetensors").responses()

    def test_other_files_are_refused(self, original, other, tmp_path):
        kl = built(original)
        kl.score(other).table.save(tmp_path / "t.safetensors")
        kl.reference.save(tmp_path / "bare.safetensors")
        for name, reason in (("t", "not a heretic-kl ref"), ("bare", "did not save"), ("no", "no")):
            with pytest.raises(MeasurementError, match=reason):
                TeacherForcedKL.load(tmp_path / f"{name}.safetensors")


def same(one: Measurement, two: Measurement) -> bool:
    columns: dict[str, torch.Tensor] = two.table.columns()
    table: KLTable = one.table
    return one.summary == two.summary and all(
        torch.equal(column, columns[name]) for name, column in table.columns().items()
    )
