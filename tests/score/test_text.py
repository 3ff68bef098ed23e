"""KL over text: windows, documents, groups; checked against plain `transformers` in float64."""

import json
from dataclasses import replace

import pytest
import torch

from heretic_kl.errors import MeasurementError, PromptError
from heretic_kl.kl import KLTable
from heretic_kl.model import ModelSource, load_tokenizer
from heretic_kl.score import Document, TeacherForcedKL, TextKL, load_documents
from heretic_kl.score.text.windows import cut_documents
from heretic_kl.testing import WORDS, tiny_tokenizer

DOCUMENTS = [
    Document(" ".join(WORDS * 2), "long"),
    Document(" ".join(WORDS[5:30]), "short"),
    Document(" ".join(WORDS[9:12]), "short"),
    Document("sorry", "one token"),
]


def built(reference, documents=DOCUMENTS, **options):
    return TextKL(reference, documents, **{"context": 16, "stride": 6, **options})


def plain_kl(reference, candidate, window):
    """(N,) float64 at the scored positions of one window, by whole passes and nothing of ours."""
    ids = torch.tensor([[*window.sequence.prompt, *window.sequence.response]])
    logits = [
        model(ids).logits[0, :-1].double().log_softmax(-1) for model in (reference, candidate)
    ]
    p, q = (rows[-len(window.sequence.response) :] for rows in logits)
    return (p.exp() * (p - q)).sum(-1)


class TestValues:
    def test_a_model_against_itself_is_exactly_zero(self, original):
        measured = built(original).score(original)
        assert measured.kl == 0.0 and all(group.mean == 0.0 for group in measured.groups)
        assert measured.table.values.abs().sum() == 0.0

    @torch.no_grad()
    def test_it_is_the_mean_over_positions_then_documents(self, original, other, load):
        measured = built(original).score(other)
        windows = cut_documents(DOCUMENTS, tiny_tokenizer(), context=16, stride=6)
        models = load(original), load(other)
        rows = [plain_kl(*models, window) for window in windows]
        assert torch.allclose(
            measured.table.values[measured.table.mask], torch.cat(rows), rtol=1e-6
        )
        by_document = {}
        for window, values in zip(windows, rows, strict=True):
            by_document.setdefault(window.document, []).append(values)
        # The long one is alone in its group: its windows are the independent units.
        long = torch.stack([values.mean() for values in by_document[0]])
        short = torch.stack([torch.cat(by_document[index]).mean() for index in (1, 2)])
        assert measured.kl == pytest.approx(float(torch.cat([long, short]).mean()), rel=1e-6)
        first, second = measured.groups
        assert (first.name, second.name) == ("long", "short")
        assert first.mean == pytest.approx(float(long.mean()), rel=1e-6)
        assert second.mean == pytest.approx(float(short.mean()), rel=1e-6)
        assert first.standard_error == pytest.approx(float(long.std() / len(long) ** 0.5), rel=1e-6)
        macro = measured.macro_average
        assert macro.mean == pytest.approx((first.mean + second.mean) / 2)
        together = (first.standard_error**2 + second.standard_error**2) ** 0.5 / 2
        assert macro.standard_error == pytest.approx(together)

    def test_batches_and_blocks_change_nothing(self, original, other, monkeypatch):
        from heretic_kl.score import reference_run

        table = built(original).score(other).table
        sizes = []
        real = reference_run.LogitBlock

        def counted(rows, logits):
            sizes.append(logits.numel())
            return real(rows, logits)

        monkeypatch.setattr(reference_run, "LogitBlock", counted)
        monkeypatch.setattr(reference_run, "MAX_LOGIT_ELEMENTS", 3 * len(tiny_tokenizer()))
        small = built(original, batch_size=1).score(other).table
        assert torch.allclose(small.values, table.values, rtol=1e-4, atol=1e-7)
        assert max(sizes) <= 3 * len(tiny_tokenizer())  # logits at once, however long the context

    def test_results_travel(self, original, other, tmp_path):
        measured = built(original).score(other)
        plain = json.loads(json.dumps(measured.to_dict(), allow_nan=False))
        assert plain["macro_average"]["mean"] == measured.macro_average.mean
        assert [group["name"] for group in plain["groups"]] == ["long", "short"]
        measured.table.save(tmp_path / "t.safetensors")
        again = KLTable.load(tmp_path / "t.safetensors")
        assert torch.equal(again.clusters, measured.table.clusters)
        pair = measured.compare(built(original).score(original))
        assert pair.mean_difference == pytest.approx(measured.kl)


class TestStored:
    OPTIONS = {"context": 16, "stride": 6}  # noqa: RUF012

    @pytest.fixture
    def file(self, tmp_path):
        return tmp_path / "r.safetensors"

    def test_it_measures_as_the_model_did(self, original, make_adapter, file):
        adapter = make_adapter(original, str(original))
        kl = built(original, divergence="reverse_kl", temperature=1.5, bands=True)
        kl.save(file)
        stored = TextKL.load(file, DOCUMENTS, tiny_tokenizer(), **self.OPTIONS)
        here, there = stored.score(adapter), kl.score(adapter)
        assert here.to_dict(worst=3) == there.to_dict(worst=3) and here.kl > 0
        columns = there.table.columns()
        assert all(torch.equal(c, columns[name]) for name, c in here.table.columns().items())
        assert (stored.bands, stored.noise_floor) == (kl.bands, kl.noise_floor)
        assert stored.groups == ("long", "short")
        assert here.compare(there).mean_difference == 0.0

    def test_with_the_head_any_other_too(self, original, other, file):
        kl = built(original)
        kl.save(file, store="head")
        stored, there = TextKL.load(file, DOCUMENTS, **self.OPTIONS).score(other), kl.score(other)
        assert stored.summary == there.summary and stored.groups == there.groups
        assert torch.equal(stored.table.values, there.table.values)
        whole = kl.reference.hidden.nbytes + kl._run.head.weight.nbytes
        assert whole < file.stat().st_size < whole + 20_000

    def test_what_differs_is_one_line(self, original, stranger, file, tmp_path):
        built(original).save(file)
        regrouped = [replace(document, group="all") for document in DOCUMENTS]
        for documents, options, reason in (
            (DOCUMENTS[:3], {}, r"another text \(stored \w{12}, now \w{12}\), another gr"),
            (regrouped, {}, r"fit: another grouping \(stored \w{12}, now \w{12}\); measure with"),
            (DOCUMENTS, {"context": 15}, r"another context \(stored 16, now 15\)"),
            (
                DOCUMENTS,
                {"context": 15, "stride": 5},
                r"now 15\), another stride \(stored 6, now 5",
            ),
        ):
            with pytest.raises(MeasurementError, match=reason) as raised:
                TextKL.load(file, documents, **{**self.OPTIONS, **options})
            assert "\n" not in str(raised.value)
        with pytest.raises(MeasurementError, match="reference of another tokenizer"):
            TextKL.load(file, DOCUMENTS, load_tokenizer(ModelSource(str(stranger))), **self.OPTIONS)
        with pytest.raises(MeasurementError, match="another tokenizer"):
            TextKL.load(file, DOCUMENTS, **self.OPTIONS).score(stranger)
        with pytest.raises(MeasurementError, match="stored over text: name .* with --text"):
            TeacherForcedKL.load(file)
        TeacherForcedKL(original, prompts=["sorry"], kl_tokens=1, noise_floor=False).save(file)
        with pytest.raises(MeasurementError, match="stored over responses: leave out --text"):
            TextKL.load(file, DOCUMENTS, **self.OPTIONS)

    def test_files_may_have_other_names(self, original, other, file):
        kl = built(original)
        kl.save(file, store="head")
        renamed = [replace(document, group=f"new {document.group}") for document in DOCUMENTS]
        stored = TextKL.load(file, renamed, **self.OPTIONS)
        assert stored.groups == ("new long", "new short")
        assert stored.score(other).summary == kl.score(other).summary

    def test_what_cannot_be_stored(self, original, file, tmp_path, monkeypatch):
        kl = built(original, noise_floor=False)
        kl.save(tmp_path / "logits.safetensors", store="logits")
        stored = TextKL.load(tmp_path / "logits.safetensors", DOCUMENTS, **self.OPTIONS)
        monkeypatch.setattr("heretic_kl.score.stored.free_memory", lambda device: 1000)
        stored.save(tmp_path / "again.safetensors", store="logits")  # which are in memory already
        with pytest.raises(MeasurementError, match="GB are free: store the head"):
            kl.save(file, store="logits")
        kl = built(original, DOCUMENTS[:1], llama_windows=True, noise_floor=False)
        with pytest.raises(MeasurementError, match="stored in its own file"):
            kl.save(file)
        assert not file.exists()


class TestWindows:
    def test_each_token_is_scored_once_with_enough_before_it(self):
        ids = " ".join(str(n) for n in range(50))
        windows = cut_documents([Document(ids, "g")], Numbers(), context=16, stride=6)
        scored = [token for window in windows for token in window.sequence.response]
        assert scored == list(range(10, 46))
        assert all(len(window.sequence.prompt) == 10 for window in windows)

    @pytest.mark.parametrize(("length", "scored"), [(15, 6), (8, 3), (2, 1), (16, 6)])
    def test_the_same_share_of_a_short_document(self, length, scored):
        text = " ".join(str(n) for n in range(length))
        (window,) = cut_documents([Document(text, "g")], Numbers(), context=16, stride=6)
        assert window.sequence.response == tuple(range(length - scored, length))

    def test_a_first_token_is_in_every_window(self):
        ids = " ".join(str(n) for n in range(40))
        windows = cut_documents([Document(ids, "g")], Numbers(bos=99), context=16, stride=6)
        assert len(windows) == 5
        assert all(window.sequence.prompt[0] == 99 for window in windows)
        assert windows[0].sequence.prompt[1] == 1  # in place of its first token


class Numbers:
    """A tokenizer of numbers."""

    def __init__(self, bos=None):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens=True, verbose=True):
        first = [] if self.bos_token_id is None or not add_special_tokens else [self.bos_token_id]
        return {"input_ids": [*first, *(int(word) for word in text.split() if word.isdigit())]}


class TestFiles:
    def test_files_and_categories_are_groups(self, tmp_path):
        (tmp_path / "wiki.raw").write_text("how do I make a cake")
        rows = [
            {"text": "sorry", "category": "chat"},
            {"text": " ", "category": "chat"},
            {"text": "flour", "category": "code"},
            {"text": "rome", "category": None},
        ]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        documents = load_documents([tmp_path / "wiki.raw", tmp_path / "t.jsonl"])
        assert [document.group for document in documents] == ["wiki.raw", "chat", "code", "t.jsonl"]

    def test_mistakes_are_one_line(self, tmp_path):
        for name, content in (("empty.txt", b"\n"), ("binary.txt", b"\xff\xfe\x80")):
            (tmp_path / name).write_bytes(content)
        (tmp_path / "t.csv").write_text("body,category\nhow,a\n")
        (tmp_path / "a.txt").write_text("how")
        for names, reason in (
            (["gone.txt"], "no such text file"),
            (["empty.txt"], "holds no text"),
            (["binary.txt"], "not UTF-8"),
            (["t.csv"], "name the column of the texts with --text-column"),
            (["a.txt", "./a.txt"], "named twice"),
        ):
            with pytest.raises(PromptError, match=reason) as raised:
                load_documents([tmp_path / name for name in names])
            assert "\n" not in str(raised.value)
        assert load_documents([tmp_path / "t.csv"], column="body")[0].text == "how"

    def test_what_cannot_be_measured(self, original):
        with pytest.raises(MeasurementError, match="too short"):
            built(original, [Document("sorry", "g")])
        with pytest.raises(MeasurementError, match="at most 128 tokens"):
            built(original, context=300)
        with pytest.raises(ValueError, match="stride must be from 1 to context - 1, got 16 of 16"):
            built(original, stride=16)
