"""llama.cpp's file of base logits, against a plain reader and writer of its layout."""

import json
import math
import struct

import numpy
import pytest
import torch

from heretic_kl.cli import main as cli
from heretic_kl.errors import MeasurementError
from heretic_kl.score import TextKL
from heretic_kl.score.llama.base_logits import BaseLogits
from heretic_kl.testing import WORDS, tiny_tokenizer

CONTEXT = 20
TEXT = " ".join(WORDS * 3)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def windows():
    ids = tiny_tokenizer()(TEXT)["input_ids"]
    return [ids[at : at + CONTEXT] for at in range(0, len(ids) - CONTEXT + 1, CONTEXT)]


@torch.no_grad()
def scored_logits(model, windows):
    """(windows, scored, V) float64 of positions CONTEXT / 2 to CONTEXT - 2."""
    return model(torch.tensor(windows)).logits[:, CONTEXT // 2 : -1].double()


def written_plainly(path, windows, logits):
    """The layout, number by number."""
    vocabulary = logits.shape[-1]
    data = b"_logits_" + struct.pack("<3i", CONTEXT, vocabulary, len(windows))
    data += struct.pack(f"<{len(windows) * CONTEXT}i", *(token for w in windows for token in w))
    for row in logits.reshape(-1, vocabulary).tolist():
        top = max(row)
        smallest = max(min(row), top - 16)
        total = math.log(sum(math.exp(value - top) for value in row))
        scale = (top - smallest) / 65535
        levels = [round((value - smallest) / scale) if value > smallest else 0 for value in row]
        data += struct.pack("<2f", scale, smallest - top - total)
        data += struct.pack(f"<{vocabulary}H", *levels) + b"\0\0" * (vocabulary % 2)
    path.write_bytes(data)
    return path


def as_llama_prints(path, logits, windows):
    """Mean KL, RMS change of p and same top by the program's loops, from the file's bytes."""
    data = path.read_bytes()
    vocabulary = logits.shape[-1]
    start = 20 + 4 * CONTEXT * len(windows)
    width = 8 + 4 * ((vocabulary + 1) // 2)
    tokens = [token for window in windows for token in window[CONTEXT // 2 + 1 :]]
    divergences, changes, same = [], [], 0
    for index, row in enumerate(logits.reshape(-1, vocabulary)):
        scale, smallest = struct.unpack_from("<2f", data, start + index * width)
        levels = struct.unpack_from(f"<{vocabulary}H", data, start + index * width + 8)
        base = [scale * level + smallest for level in levels]
        ours = row.log_softmax(-1).tolist()
        pairs = zip(base, ours, strict=True)
        divergences.append(sum(math.exp(p) * (p - q) for p, q in pairs if p > -16))
        token = tokens[index]
        changes.append(math.exp(ours[token]) - math.exp(base[token]))
        same += base.index(max(base)) == ours.index(max(ours))
    rms = math.sqrt(sum(change**2 for change in changes) / len(changes))
    return sum(divergences) / len(divergences), rms, same / len(changes)


class TestFile:
    def test_it_is_read_as_it_was_written(self, original, load, windows, tmp_path):
        logits = scored_logits(load(original), windows)
        base = BaseLogits.open(written_plainly(tmp_path / "base", windows, logits))
        assert base.tokens.tolist() == windows and base.rows == logits[..., 0].numel()
        rows = torch.tensor([3, 0, base.rows - 1])
        expected = logits.flatten(0, 1)[rows].log_softmax(-1)
        stored = base.of(rows).double()
        known = stored > -math.inf
        assert torch.equal(known, expected > expected.amax(-1, keepdim=True) - 16)
        assert float((stored - expected)[known].abs().max()) < 16 / 65535

    @pytest.mark.parametrize("scale", [1.0, 20.0])
    def test_what_we_write_is_what_the_plain_writer_writes(
        self, original, load, windows, file, tmp_path, scale
    ):
        model = load(original)
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)  # the larger, the more is clipped
        kl = TextKL(model, [file], tiny_tokenizer(), context=CONTEXT, llama_windows=True)
        kl.write_llama_base(tmp_path / "ours")
        plain = written_plainly(tmp_path / "plain", windows, scored_logits(model, windows))
        ours, theirs = (BaseLogits.open(tmp_path / name) for name in ("ours", "plain"))
        assert (tmp_path / "ours").stat().st_size == plain.stat().st_size
        assert ours.tokens.tolist() == theirs.tokens.tolist()
        rows = torch.arange(ours.rows)
        assert bool(ours.clipped(rows).any()) == (scale > 1.0)
        assert torch.allclose(ours.stored(rows), theirs.stored(rows), atol=16 / 65535 + 1e-4)
        level_gap = numpy.abs(ours.levels[:, 4:].astype(int) - theirs.levels[:, 4:].astype(int))
        assert level_gap.max() <= 2 * scale  # float32 against float64

    def test_files_that_are_none(self, original, load, windows, tmp_path):
        logits = scored_logits(load(original), windows)
        data = written_plainly(tmp_path / "base", windows, logits).read_bytes()
        for content, reason in (
            (b"GGUF" + data, "not a file of base logits"),
            (data[:15], "not a file of base logits"),
            (data[:-2], "cut off"),
            (data[:8] + struct.pack("<3i", 2, 5, 1) + data[20:], "windows of 2 tokens"),
        ):
            (tmp_path / "broken").write_bytes(content)
            with pytest.raises(MeasurementError, match=reason) as raised:
                BaseLogits.open(tmp_path / "broken")
            assert "\n" not in str(raised.value)
        with pytest.raises(MeasurementError, match="cannot be read: No such file"):
            BaseLogits.open(tmp_path / "gone")


class TestMeasuring:
    @pytest.fixture
    def base(self, original, load, windows, tmp_path):
        return written_plainly(tmp_path / "base", windows, scored_logits(load(original), windows))

    def test_llama_s_figures_and_ours(self, base, other, load, windows, original, file):
        kl = TextKL.from_llama_base(base, tiny_tokenizer(), dtype="float32")
        measured = kl.score(other)
        logits = scored_logits(load(other), windows)
        mean, rms, same = as_llama_prints(base, logits, windows)
        rows = {row.name: row for row in measured.llama_rows.rows}
        assert rows["mean"].llama == pytest.approx(mean, rel=1e-5)
        assert rows["RMS change of p"].llama == pytest.approx(rms, rel=1e-4)
        assert rows["same top token"].llama == same
        # Nothing is clipped here: what the file knows is all there is, but for its rounding.
        assert measured.llama_rows.clipped_mass == 0.0
        whole = TextKL(original, [file], context=CONTEXT, llama_windows=True, dtype="float32")
        assert measured.kl == pytest.approx(whole.score(other).kl, rel=1e-3)
        assert rows["mean"].ours == measured.kl
        assert rows["mean"].ours_error == measured.summary.standard_error

    def test_its_own_model_is_at_zero(self, base, original, tmp_path):
        kl = TextKL.from_llama_base(base, tiny_tokenizer(), dtype="float32")
        assert kl.score(original).kl < 1e-8
        for store in ("hidden", "head", "logits"):
            with pytest.raises(MeasurementError, match="stored in its own file"):
                kl.save(tmp_path / "r.safetensors", store=store)

    def test_clipped_tokens_leave_a_lower_bound(
        self, original, other, load, windows, file, tmp_path
    ):
        model, candidate = load(original), load(other)
        with torch.no_grad():
            model.lm_head.weight.mul_(20.0)
            candidate.lm_head.weight.mul_(20.0)
        options = {"context": CONTEXT, "llama_windows": True}
        whole = TextKL(model, [file], tiny_tokenizer(), **options)
        whole.write_llama_base(tmp_path / "clipped")
        kl = TextKL.from_llama_base(tmp_path / "clipped", tiny_tokenizer())
        bound = kl.score(candidate)
        assert 0.0 < bound.kl < whole.score(candidate).kl
        assert 0.0 < bound.llama_rows.clipped_mass < 1.0
        assert kl.score(model).kl < 1e-6

    def test_another_tokenizer_s_tokens_are_refused(self, base):
        tokenizer = tiny_tokenizer()
        reverse = {index: word for word, index in tokenizer.get_vocab().items()}
        tokenizer.decode = lambda ids, **options: " ".join(reverse[i] + "x" for i in ids)
        with pytest.raises(MeasurementError, match="token ids of another tokenizer"):
            TextKL.from_llama_base(base, tokenizer)


class TestCommand:
    def test_round_trip(self, original, other, file, make_adapter, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        words = ["--candidate", str(other), "--dtype", "float32", "--json", "o.json"]
        text = ["--text", str(file), "--context", str(CONTEXT), "--write-llama-base", "base"]
        assert cli.main(["score", "-r", str(original), *words, *text]) == 0
        whole = json.loads((tmp_path / "o.json").read_text())["candidates"][0]
        capsys.readouterr()
        words[3] = "auto"
        assert cli.main(["score", "-r", "base", "--candidate", str(other), "--json", "b.json"]) == 0
        out = capsys.readouterr().out
        assert "As llama.cpp computes it, and ours" in out and "A lower bound" in out
        assert max(map(len, out.splitlines())) <= 80
        found = json.loads((tmp_path / "b.json").read_text())["candidates"][0]
        rows = {row["name"]: row for row in found["llama_rows"]}
        assert rows["mean"]["ours"] == found["mean"] == pytest.approx(whole["mean"], rel=0.05)
        bare = str(make_adapter(original, str(original)))  # without a tokenizer
        assert cli.main(["score", "-r", "base", "--candidate", bare, str(other)]) == 0
        capsys.readouterr()
        assert cli.main(["score", "-r", "base", "--candidate", str(other), "--kl-tokens", "3"]) == 2
        assert "--kl-tokens has no effect" in capsys.readouterr().err
        (tmp_path / "base").write_bytes((tmp_path / "base").read_bytes()[:-1])
        assert cli.main(["score", "-r", "base", "--candidate", str(other)]) == 1
        assert "was cut off" in capsys.readouterr().err

    def test_one_file_without_a_stride(self, original, other, file, capsys):
        words = ["score", "-r", str(original), "--candidate", str(other), "--write-llama-base", "b"]
        assert cli.main([*words, "--text", str(file), "--stride", "4"]) == 2
        assert "--stride has no effect with --write-llama-base" in capsys.readouterr().err
        assert cli.main([*words, "--text", str(file), "--text", "x.txt"]) == 2
        assert "takes one file after --text" in capsys.readouterr().err
        assert cli.main(words) == 2
        assert "--write-llama-base has no effect without --text" in capsys.readouterr().err
