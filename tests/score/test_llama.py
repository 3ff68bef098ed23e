"""GGUF files run by llama.cpp itself, against `transformers` on the same weights."""

import json
import shutil

import pytest
import torch
from gguf_models import PROMPTS, bpe_tokenizer, built, make_models

from heretic_kl.cli import main as cli
from heretic_kl.errors import MeasurementError, ModelError
from heretic_kl.score import (
    Document,
    TeacherForcedKL,
    TextKL,
    measure_chain,
)
from heretic_kl.score.llama import LlamaModel, model
from heretic_kl.testing import WORDS, save_tiny_model, tiny_llama
from heretic_kl.testing.gguf_file import write_llama_gguf

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def reference(models):
    """Measures with every prompt; told collects what the user is told."""
    told = []
    kl = built(models, notify=told.append)
    kl.told = told
    return kl


class TestValues:
    def test_the_same_weights_are_the_same_model(self, models, reference):
        measured = reference.score(models / "f32.gguf")
        assert 0.0 < measured.kl < 1e-9 and measured.back_end_floor < 1e-9
        assert measured.candidate_dtype == "all F32, f32 cache, llama.cpp"
        in_transformers = built(models, backend="transformers").score(models / "f32.gguf")
        assert in_transformers.kl < 1e-9 and in_transformers.back_end_floor is None

    def test_coarser_weights_are_further_away(self, models, reference):
        q8, q4 = (reference.score(models / f"{name}.gguf") for name in ("q8_0", "q4_0"))
        assert 1e-6 < q8.kl < q4.kl
        assert q4.compare(q8).mean_difference == pytest.approx(q4.kl - q8.kl)
        again = reference.score(models / "q4_0.gguf")
        assert torch.equal(again.table.values, q4.table.values)

    @torch.no_grad()
    def test_quantized_weights_measure_as_plain_passes_over_unpacked_ones(self, models, reference):
        from transformers import AutoModelForCausalLM

        load = AutoModelForCausalLM.from_pretrained
        original = load(models / "original", dtype=torch.float32)
        unpacked = load(models, gguf_file="q8_0.gguf", dtype=torch.float32)
        rows = []
        for sequence in reference._run.sequences:
            ids = torch.tensor([sequence.fed])
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (original, unpacked))
            scored = list(sequence.scored)
            rows.append((p.exp() * (p - q))[scored].sum(-1))
        plain = float(torch.stack([values.mean() for values in rows]).mean())
        measured = reference.score(models / "q8_0.gguf")
        # llama.cpp also rounds what is multiplied with the weights; the floor is the size of that.
        assert 0.0 < measured.back_end_floor < plain < 2 * measured.kl < 4 * plain

    def test_a_cache_of_fewer_bits_is_part_of_what_is_measured(self, models):
        kl = TeacherForcedKL(
            models / "original",
            prompts=PROMPTS,
            kl_tokens=4,
            dtype="float32",
            gguf_cache_type="q4_0",
        )
        measured = kl.score(models / "f32.gguf")
        assert measured.kl > 1e-5 and measured.candidate_dtype == "all F32, q4_0 cache, llama.cpp"
        assert measured.back_end_floor < 1e-4  # which is of the arithmetic alone
        assert "above the" in measured.verdict

    def test_text_in_windows(self, models):
        documents = [Document(" ".join(WORDS * 4), "long"), Document("make a cake please", "short")]
        kl = TextKL(
            models / "original",
            documents,
            context=48,
            stride=40,
            dtype="float32",
            gguf_cache_type="f32",
        )
        measured = kl.score(models / "f32.gguf")
        assert 0.0 < measured.kl < 1e-9 and len(measured.groups) == 2
        assert measured.table.mask.sum() == kl.reference.rows

    def test_few_rows_of_logits_are_held(self, models, reference, monkeypatch):
        whole = reference.score(models / "q4_0.gguf").table
        monkeypatch.setattr(model, "MOST_ROWS", 3)
        opened = LlamaModel(models / "q4_0.gguf", context=64)
        parts = [block for s in reference._run.sequences for block in opened.blocks(s)]
        assert max(len(block) for block in parts) == 3
        assert sum(len(block) for block in parts) == reference.reference.rows
        in_parts = reference.score(models / "q4_0.gguf").table
        assert torch.allclose(in_parts.values, whole.values, rtol=1e-3, atol=1e-6)

    def test_it_responds_as_the_reference_does(self, models, reference):
        opened = LlamaModel(models / "f32.gguf", context=64)
        for sequence in reference._run.sequences:
            assert tuple(opened.respond(sequence.prompt, 4)) == sequence.response


@pytest.fixture(scope="module")
def live(models):
    """The float32 file in llama.cpp as the reference."""
    return TeacherForcedKL(
        models / "f32.gguf",
        prompts=PROMPTS,
        kl_tokens=4,
        backend="llama.cpp",
        gguf_cache_type="f32",
        reference_cache_type="f32",
    )


class TestAsTheReference:
    def test_it_measures_what_the_safetensors_measure(self, models, live, reference):
        assert live.responses() == reference.responses()
        assert live.reference_dtype == "all F32, f32 cache, llama.cpp"
        for name in ("q8_0", "q4_0"):
            in_step, beside = (kl.score(models / f"{name}.gguf") for kl in (live, reference))
            assert in_step.kl == pytest.approx(beside.kl, rel=1e-3)
            assert in_step.back_end_floor is None
        assert 0.0 <= live.noise_floor.value < 1e-9

    def test_a_file_is_at_exactly_zero_from_itself(self, models, live):
        assert live.score(models / "f32.gguf").table.values.abs().max() == 0.0

    def test_the_cache_of_fewer_bits_is_the_candidate_s_alone(self, models):
        options = {"prompts": PROMPTS, "kl_tokens": 4, "backend": "llama.cpp"}
        kl = TeacherForcedKL(models / "f32.gguf", gguf_cache_type="q4_0", **options)
        measured = kl.score(models / "f32.gguf")
        assert measured.kl > 1e-5
        assert measured.reference_dtype == "all F32, llama.cpp"
        assert measured.candidate_dtype == "all F32, q4_0 cache, llama.cpp"
        alike = TeacherForcedKL(
            models / "f32.gguf", gguf_cache_type="q4_0", reference_cache_type="q4_0", **options
        )
        assert alike.score(models / "f32.gguf").kl == 0.0

    def test_over_text_in_blocks(self, models, monkeypatch):
        monkeypatch.setattr(model, "MOST_ROWS", 7)
        text = [Document(" ".join(WORDS * 4), "long")]
        options = {"context": 48, "stride": 40, "gguf_cache_type": "f32"}
        live = TextKL(
            models / "f32.gguf", text, backend="llama.cpp", reference_cache_type="f32", **options
        )
        beside = TextKL(models / "original", text, dtype="float32", **options)
        in_step, apart = (kl.score(models / "q4_0.gguf") for kl in (live, beside))
        assert torch.allclose(in_step.table.values, apart.table.values, rtol=1e-2, atol=1e-5)

    def test_what_it_does_not_do(self, models, live, tmp_path):
        with pytest.raises(MeasurementError, match="these must be .gguf files, or pass --backend"):
            live.score(models / "original")
        with pytest.raises(MeasurementError, match="responds greedily"):
            TeacherForcedKL(
                models / "f32.gguf", prompts=PROMPTS, response="sampled(1)", backend="llama.cpp"
            )
        with pytest.raises(MeasurementError, match="no hidden states to store: store logits"):
            live.save(tmp_path / "r.safetensors")

    def test_its_logits_can_be_kept(self, models, live, tmp_path):
        live.save(tmp_path / "r.safetensors", store="logits")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors", gguf_cache_type="f32")
        assert stored.score(models / "f32.gguf").kl < 1e-6
        (tmp_path / "wiki.txt").write_text(" ".join(WORDS * 3))
        options = {"context": 40, "llama_windows": True, "backend": "llama.cpp"}
        options |= {"gguf_cache_type": "f32", "reference_cache_type": "f32"}
        kl = TextKL(models / "f32.gguf", [tmp_path / "wiki.txt"], **options)
        kl.write_llama_base(tmp_path / "base")
        base = TextKL.from_llama_base(tmp_path / "base", bpe_tokenizer(), gguf_cache_type="f32")
        near, far = (base.score(models / f"{name}.gguf") for name in ("f32", "q4_0"))
        assert near.kl < 1e-8 and far.kl == pytest.approx(kl.score(models / "q4_0.gguf").kl, 0.01)

    def test_the_command_takes_files_alone(self, models, capsys):
        words = ["-r", models / "f32.gguf", "--candidate", models / "f32.gguf"]
        assert TestCommand().run(*words, "--gguf-cache-type", "q4_0") == 0
        out = capsys.readouterr().out
        assert "(all F32, llama.cpp)" in out and "(all F32, q4_0 cache, llama.cpp)" in out
        both = (*words, models / "original", "--reference-cache-type", "q4_0")
        assert TestCommand().run(*both) == 2
        assert "no effect on a reference in transformers" in capsys.readouterr().err
        words = ["-r", models / "f32.gguf", "--candidate", models / "q8_0.gguf"]
        assert TestCommand().run(*words) == 0
        out = capsys.readouterr().out
        assert "(all F32, llama.cpp)" in out and "floor across back ends" not in out

    def test_a_chain_ends_in_files(self, models, reference):
        files = [models / "q8_0.gguf", models / "q4_0.gguf"]
        chain = measure_chain(reference, files, [reference.score(file) for file in files])
        step = chain.pairs[2].measurement
        assert step.back_end_floor is None and 1e-4 < step.kl < 2 * chain.whole.kl
        assert reference.seen_by(files[0]).score(files[0]).kl == 0.0

    def test_a_file_within_a_chain_keeps_no_logits(self, models, reference, monkeypatch):
        ran = []
        real = LlamaModel.blocks
        monkeypatch.setattr(
            LlamaModel, "blocks", lambda self, s, *n: (ran.append(s), real(self, s, *n))[1]
        )
        seen = reference.seen_by(models / "f32.gguf")
        assert not ran and seen.reference.hidden is None
        measured = seen.score(models / "original")  # in another back end, in another order
        assert 0.0 < measured.kl < 1e-9
        assert sorted(s.prompt for s in ran) == sorted(s.prompt for s in seen.inputs.sequences)
        monkeypatch.setattr(model, "MOST_ROWS", 3)
        live = seen.reference.logits
        rows = torch.tensor([4, 5, 6, 0, 1, 9, 10, 11])
        assert torch.allclose(live.of(rows), torch.cat(list(live.blocks()))[rows], atol=1e-5)


class TestTokens:
    def written(self, models, tmp_path, change):
        """The original, its tokenizer changed, as a GGUF file."""
        folder = shutil.copytree(models / "original", tmp_path / "changed")
        file = folder / "tokenizer.json"
        stored = json.loads(file.read_text())
        change(stored["model"])
        file.write_text(json.dumps(stored))
        return write_llama_gguf(folder, tmp_path / "changed.gguf", dtype="F32")

    def test_the_same_tokens_are_no_news(self, models, reference):
        reference.told.clear()
        reference.score(models / "f32.gguf")
        assert reference.told == []

    def test_another_token_is_named(self, models, reference, tmp_path):
        def rename(tokenizer):
            tokenizer["merges"].pop()  # the one that makes it
            tokenizer["vocab"] = {
                "other" if index == 299 else text: index
                for text, index in tokenizer["vocab"].items()
            }

        path = self.written(models, tmp_path, rename)
        with pytest.raises(MeasurementError, match="1 tokens differ, the first is 299 .*'other'"):
            reference.score(path)

    def test_another_split_of_the_text_is_told(self, models, reference, tmp_path):
        path = self.written(models, tmp_path, lambda tokenizer: tokenizer["merges"].reverse())
        reference.told.clear()
        assert reference.score(path).kl < 1e-9
        assert any("4 of 4 texts into other tokens" in message for message in reference.told)

    def test_padding_of_the_vocabulary_is_left_out(self, models, reference, tmp_path):
        from transformers import AutoModelForCausalLM

        wider = AutoModelForCausalLM.from_pretrained(models / "original")
        wider.resize_token_embeddings(308, mean_resizing=False)
        wider.save_pretrained(tmp_path / "wider")
        bpe_tokenizer().save_pretrained(tmp_path / "wider")
        path = write_llama_gguf(tmp_path / "wider", tmp_path / "wider.gguf", dtype="F32")
        reference.told.clear()
        assert reference.score(path).kl < 1e-9
        assert any("the tokenizer's 300 tokens are compared" in text for text in reference.told)

    def test_a_stored_reference_is_checked_by_its_hash(self, models, reference, tmp_path):
        reference.save(tmp_path / "r.safetensors", store="logits")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors", gguf_cache_type="f32")
        measured = stored.score(models / "q4_0.gguf")
        assert measured.kl == pytest.approx(reference.score(models / "q4_0.gguf").kl, rel=1e-3)
        assert measured.back_end_floor == pytest.approx(
            reference.score(models / "q4_0.gguf").back_end_floor, rel=1e-3
        )
        reference.save(tmp_path / "h.safetensors")
        with pytest.raises(MeasurementError, match="--store head"):
            TeacherForcedKL.load(tmp_path / "h.safetensors").score(models / "q4_0.gguf")


class TestMistakes:
    def test_files_that_are_none(self, tmp_path, reference):
        (tmp_path / "x.gguf").write_text("nothing")
        with pytest.raises(ModelError, match="llama.cpp cannot load 'x.gguf'") as raised:
            LlamaModel(tmp_path / "x.gguf", context=8)
        assert "\n" not in str(raised.value)

    def test_a_cache_that_does_not_fit(self, tmp_path, models):
        folder = tmp_path / "narrow"
        config = tiny_llama(vocab_size=304, num_attention_heads=4, pad_token_id=None)
        save_tiny_model(folder, config)
        bpe_tokenizer().save_pretrained(folder)
        write_llama_gguf(folder, tmp_path / "narrow.gguf", dtype="F32")
        with pytest.raises(ModelError, match="with q4_0 keys and values"):
            LlamaModel(tmp_path / "narrow.gguf", context=8, cache_type="q4_0")

    def test_without_the_binding(self, models, reference, monkeypatch):
        monkeypatch.setattr(model, "llama_available", lambda: False)
        model._library.cache_clear()
        try:
            with pytest.raises(ModelError, match=r"install heretic-kl\[gguf\], or pass --backend"):
                LlamaModel(models / "f32.gguf", context=8)
        finally:
            model._library.cache_clear()


class TestCommand:
    def run(self, *words):
        return cli.main(
            [
                "score",
                "--dtype",
                "float32",
                "--kl-tokens",
                "2",
                "--prompts.limit",
                "3",
                *map(str, words),
            ]
        )

    def test_both_back_ends(self, models, capsys):
        words = ["-r", models / "original", "--candidate", models / "q8_0.gguf"]
        assert self.run(*words) == 0
        out = capsys.readouterr().out
        assert "floor across back ends" in out and "(Q8_0, llama.cpp)" in out
        assert self.run(*words, "--backend", "transformers") == 0
        out = capsys.readouterr().out
        assert "back ends" not in out and "(float32)" in out

    @pytest.mark.parametrize(
        ("candidate", "words", "expected"),
        [
            ("m", ["--backend", "llama.cpp"], "--backend has no effect without a .gguf candidate"),
            ("m.gguf", ["--gguf-cache-type", "q3"], "gguf_cache_type must be one of f16, f32"),
            (
                "m.gguf",
                ["--reference-cache-type", "q8_0"],
                "--reference-cache-type has no effect without a .gguf reference",
            ),
            (
                "m.gguf",
                ["--gguf-cache-type", "q8_0", "--backend", "transformers"],
                "--gguf-cache-type has no effect with --backend transformers",
            ),
        ],
    )
    def test_flags_without_effect_are_refused(self, candidate, words, expected, capsys):
        assert self.run("-r", "a", "--candidate", candidate, *words) == 2
        assert expected in capsys.readouterr().err
