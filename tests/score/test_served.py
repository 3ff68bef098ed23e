"""Candidates behind a server: what it tells, what is made of it, and what is refused."""

import json
import logging

import pytest
import torch
from score.judge import log_rows, mean_of_means
from score.served_model import serving
from score_documents import as_documented

from heretic_kl.cli import main as cli
from heretic_kl.errors import ConfigError, MeasurementError
from heretic_kl.kl import KLTable
from heretic_kl.score import Document, TeacherForcedKL, TextKL
from heretic_kl.testing import WORDS, tiny_tokenizer

PROMPTS = ["make a cake", "tell me about Rome", "wait please", "how do I make a cake"]
KEY = "sk-Very-Secret-0123456789"


@pytest.fixture(scope="module")
def reference(original):
    return TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=4, dtype="float32", device="cpu")


@pytest.fixture
def served(other, original, load):
    models = {"org/other": load(other), "org/original": load(original)}
    with serving(models, tiny_tokenizer()) as (server, replies):
        replies.server, replies.url = server, f"{server.url}#org/other"
        yield replies


def measured(reference, name, top=20, **loading):
    reference._run.loader.top_logprobs = top
    for field, value in {"key_variable": None, "base": None, **loading}.items():
        setattr(reference._run.loader, field, value)
    return reference.score(name)


class TestValues:
    @pytest.mark.parametrize("form", ["prompt_logprobs", "echo", "text"])
    def test_a_lower_bound_with_the_missing_mass(self, reference, served, form, load, original):
        served.forms = {"echo" if form == "text" else form}
        served.ids_as_text = form == "text"
        bound = measured(reference, served.url, top=5)
        whole = reference.score(served.models["org/other"])
        mask = whole.table.mask
        assert bound.table.lower_bound and torch.equal(bound.table.mask, mask)
        assert (bound.table.values <= whole.table.values + 1e-6).all()
        assert 0.1 * whole.kl < bound.kl < whole.kl
        p, q = (
            log_rows(model, reference._run.sequences)
            for model in (load(original), served.models["org/other"])
        )
        rests = [
            1 - torch.stack([row.exp()[list(names)].sum() for row, names in rows]).double()
            for rows in (self.with_known(p, q, reference), self.with_known(q, q, reference))
        ]
        known = bound.known_tokens
        if form != "text":  # which leaves out tokens that look alike
            means = [mean_of_means(rest.split([len(r) for r in p]))[0] for rest in rests]
            assert [known.reference_rest, known.candidate_rest] == pytest.approx(means, abs=1e-5)
        assert bound.change.gain.mean == pytest.approx(whole.change.gain.mean, abs=1e-5)
        assert bound.summary.top1_agreement == whole.summary.top1_agreement
        assert [place.candidate_token for place in bound.worst_positions(3)] != []
        assert str(bound).startswith("at least ") and "top 5 tokens" in bound.verdict

    def with_known(self, values, q, reference):
        for rows, known, sequence in zip(values, q, reference._run.sequences, strict=True):
            for row, likely, token in zip(rows, known, sequence.response, strict=True):
                yield row, {*likely.topk(5).indices.tolist(), token}

    def test_all_tokens_are_the_divergence(self, reference, served):
        served.most = -1
        whole = reference.score(served.models["org/other"])
        told = measured(reference, served.url, top=0)
        assert told.known_tokens is None and not told.table.lower_bound
        assert torch.allclose(told.table.values, whole.table.values, rtol=1e-5, atol=1e-7)
        assert abs(told.compare(whole).mean_difference) < 1e-6
        assert told.candidate_dtype == "served" and "at least" not in told.verdict

    def test_more_tokens_than_sequences_at_once(self, reference, served, monkeypatch):
        from heretic_kl.score.served import candidate

        once = measured(reference, served.url)
        monkeypatch.setattr(candidate, "SEQUENCES_AT_ONCE", 3)
        assert torch.equal(measured(reference, served.url).table.values, once.table.values)

    def test_token_ids_go_in(self, reference, served):
        measured(reference, served.url)
        asked = [request["prompt"] for request in served.server.requests if request]
        fed = [[*s.prompt, *s.response] for s in reference._run.sequences]
        assert all(ids in asked for ids in fed) and all(ids in fed for ids in asked)

    def test_over_text(self, original, other, served):
        documents = [Document(" ".join(WORDS), "a"), Document(" ".join(WORDS[::-1]), "b")]
        kl = TextKL(original, documents, context=16, stride=8, dtype="float32")
        bound, whole = kl.score(served.url), kl.score(other)
        assert bound.kl < whole.kl and len(bound.groups) == 2 and bound.table.lower_bound

    def test_a_stored_reference_needs_no_tokenizer(self, reference, served, tmp_path):
        reference.save(tmp_path / "r.safetensors", store="logits")
        stored = TeacherForcedKL.load(tmp_path / "r.safetensors")
        assert stored.score(served.url).kl == pytest.approx(
            measured(reference, served.url).kl, abs=1e-4
        )
        reference.save(tmp_path / "h.safetensors", store="head")
        whole = TeacherForcedKL.load(tmp_path / "h.safetensors").score(served.url)
        assert torch.equal(whole.table.values, measured(reference, served.url).table.values)
        reference.save(tmp_path / "h.safetensors")
        asked = len(served.server.requests)
        with pytest.raises(MeasurementError, match="behind a server: store its head, too"):
            TeacherForcedKL.load(tmp_path / "h.safetensors").score(served.url)
        assert len(served.server.requests) == asked
        served.forms, served.ids_as_text = {"echo"}, True
        with pytest.raises(MeasurementError, match="no tokenizer to read them"):
            stored.score(served.url)


class TestRefusals:
    def refused(self, reference, name, match, error=MeasurementError, **options):
        with pytest.raises(error, match=match) as caught:
            measured(reference, name, **options)
        assert "\n" not in str(caught.value) and KEY not in str(caught.value)

    def test_an_adapter_that_is_ignored(self, reference, served, load, other):
        served.models["adapter"] = served.models["org/original"]
        adapter = f"{served.server.url}#adapter"
        served.parents = {"adapter": "org/original"}
        self.refused(reference, adapter, "bit for bit like org/original: the server ignores the")
        served.parents = {}
        assert measured(reference, adapter).kl < 1e-6  # nobody said that it is one
        self.refused(reference, adapter, "bit for bit like org/original", base="org/original")
        served.models["another"] = served.models["org/other"]
        self.refused(reference, adapter, "like the reference, to the last dig", base="another")
        assert measured(reference, served.url, base="org/original").kl > 1e-3

    @pytest.mark.parametrize("text", [False, True])
    def test_other_tokens_than_were_sent(self, reference, served, text):
        served.forms, served.ids_as_text = ({"echo"}, True) if text else ({"prompt_logprobs"}, 0)
        served.read = lambda ids: [5, *ids]
        self.refused(reference, served.url, "other tokens than|where token")
        served.read = lambda ids: [*ids[:-1], (ids[-1] + 1) % 40]
        self.refused(reference, served.url, "other tokens than|where token")

    def test_another_tokenizer(self, reference, served):
        served.text = lambda token: f"word{token}"
        self.refused(reference, served.url, "another tokenizer than the reference's: .* differ")

    def test_a_server_without_log_probabilities_of_a_prompt(self, reference, served):
        served.forms = set()
        self.refused(reference, served.url, "no log-probabilities of a prompt: .*echo: no logpr")

    def test_fewer_tokens_than_asked_for(self, reference, served):
        self.refused(reference, served.url, "greater than max 20", top=50)
        served.most = 50

        def all_but_few(request, number):
            request = request and {**request, "prompt_logprobs": 20}
            return served(request, number)

        served.server.script = all_but_few
        self.refused(reference, served.url, r"tells \d+ of \d+ tokens.*max-logprobs -1", top=0)

    def test_only_forward_kl_has_a_bound(self, original, served):
        kl = TeacherForcedKL(original, prompts=PROMPTS, kl_tokens=2, temperature=0.7)
        self.refused(kl, served.url, "only forward_kl at temperature 1 has a lower bound")
        served.most = -1
        assert measured(kl, served.url, top=0).kl > 0

    def test_it_is_not_mixed(self, reference, served, other):
        with pytest.raises(MeasurementError, match="cannot be paired"):
            measured(reference, served.url).compare(reference.score(other))
        with pytest.raises(MeasurementError, match="cannot be paired"):
            reference.compare([served.url, other])

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("{url}", "names no model: write .*#MODEL"),
            ("http://#m", "is no address"),
            ("{url}/completions#m", "leave out /completions"),
        ],
    )
    def test_names(self, reference, served, name, match):
        self.refused(reference, name.format(url=served.server.url), match, ConfigError)

    def test_models_that_are_not_served(self, reference, served):
        url = served.server.url
        self.refused(reference, f"{url}#gone", "serves no model 'gone', but org/other, org/orig")
        for body in (b"<html>", b"[1]", {"choices": []}, {"choices": [{"prompt_logprobs": [1]}]}):

            def broken(request, number, body=body):
                return served(request, number) if request is None else (200, {}, body)

            served.server.script = broken
            self.refused(reference, served.url, "malformed|other tokens")

    def test_numbers_that_are_none(self, reference, served):
        def wrong(value):
            def reply(request, number):
                status, headers, body = served(request, number)
                if request is not None:
                    for entry in body["choices"][0]["prompt_logprobs"][1:]:
                        entry[min(entry)]["logprob"] = value
                return status, headers, body

            return reply

        for value in ("-1", None, True, 0.5, float("nan")):
            served.server.script = wrong(value)
            self.refused(reference, served.url, "malformed")
        served.server.script = wrong(0.0)
        self.refused(reference, served.url, "probabilities of one position add to")

    def test_the_key(self, reference, served, monkeypatch, caplog):
        caplog.set_level(logging.DEBUG)
        monkeypatch.setenv("TEST_KEY", KEY)
        measured(reference, served.url, key_variable="TEST_KEY")
        assert {h["Authorization"] for h in served.server.headers} == {f"Bearer {KEY}"}
        served.server.script = lambda request, number: (
            401,
            {},
            {"error": {"message": f"wrong key {KEY}"}},
        )
        self.refused(
            reference, served.url, r"401 \(wrong key \*\*\*\): check --key", key_variable="TEST_KEY"
        )
        ours = [r for r in caplog.records if not r.name.startswith("httpcore")]
        assert not [r for r in ours if KEY in r.getMessage()]
        self.refused(
            reference, served.url, "variable is not set", ConfigError, key_variable="NO_KEY"
        )


class TestCommand:
    def run(self, original, *words):
        fixed = ["--reference", original, "--kl-tokens", "3", "--prompts", "p.txt"]
        return cli.main(["score", *map(str, [*fixed, "--dtype", "float32", *words])])

    @pytest.fixture(autouse=True)
    def here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "p.txt").write_text("\n".join(PROMPTS))

    def test_it_is_shown_as_what_it_is(self, original, served, capsys, tmp_path):
        words = ["--candidate", served.url, "--json", "o.json", "--table", "t.safetensors"]
        assert self.run(original, *words, "--html", "o.html", "--top-logprobs", 5) == 0
        out = capsys.readouterr().out
        assert "lower bound of KL(reference || candidate), nats" in out
        assert "p(not in the top 5)" in out and "at least " in out and "noise floor" not in out
        assert f"{served.url} (served, top 5)" in out
        plain = json.loads((tmp_path / "o.json").read_text())
        as_documented(plain)
        assert plain["candidates"][0]["known_tokens"]["top"] == 5
        assert plain["ranking"][0]["lower_bound"]
        assert KLTable.load(tmp_path / "t.safetensors").lower_bound
        assert "lower bound of KL" in (tmp_path / "o.html").read_text()

    def test_all_tokens_stand_beside_others(self, original, other, served, capsys):
        served.most = -1
        words = ["--candidate", served.url, other, "--top-logprobs", 0]
        assert self.run(original, *words) == 0
        assert "Minus candidate 1, paired by prompt" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--candidate", "m"], "--top-logprobs has no effect without a candidate URL#MODEL"),
            (["--candidate", "http://h/v1#m", "m"], "a lower bound is compared with nothing"),
            (["--candidate", "http://h/v1#m", "--bands"], "--bands has no effect for the likel"),
            (["--candidate", "http://h/v1#m", "--plot", "p.png"], "--plot has no effect for the"),
        ],
    )
    def test_flags_that_do_not_fit(self, original, words, expected, capsys):
        assert self.run(original, *words, "--top-logprobs", 5) == 2
        assert expected in capsys.readouterr().err

    def test_servers_are_checked_before_a_model_is_loaded(self, original, capsys, monkeypatch):
        from heretic_kl.score import loader

        monkeypatch.setattr(loader, "load_to_measure", None)
        monkeypatch.setattr(loader.Pace, "__defaults__", None, raising=False)
        assert self.run(original, "--candidate", "http://127.0.0.1:9/v1#m") == 1
        assert "m at http://127.0.0.1:9/v1: no connection" in capsys.readouterr().err
        assert self.run(original, "--candidate", "http://h/v1") == 2
        assert "names no model" in capsys.readouterr().err
        chain = ["--chain", original, "a", "http://h/v1#m"]
        assert cli.main(["score", *map(str, chain)]) == 2
        assert "leave out --chain" in capsys.readouterr().err
