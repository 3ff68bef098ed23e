"""Edits that exist already, whoever made them, measured beside the original and paired."""

import html
import json
import shlex
import shutil

import pytest

from heretic_kl.cli.scorer import TEMPLATE
from heretic_kl.scoring import paired_difference
from heretic_kl.testing import save_tiny_model, tiny_llama


@pytest.fixture(scope="module")
def edits(workplace, searched):
    """Folders of a merged edit, an adapter of the same edit, and a copy of the original."""
    import contextlib
    import io
    import os

    from heretic_kl.cli import main as cli

    before = os.getcwd()
    os.chdir(workplace)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for form in ("merged", "lora"):
            words = ["--save", f"edit-{form}", "--save-as", form]
            assert cli.main(["save", "mine", "--trial", "2", *words]) == 0
    os.chdir(before)
    shutil.copytree(workplace / "model", workplace / "copy")
    return ["edit-merged", "edit-lora", "copy"]


def test_candidates_stand_beside_the_original_paired_by_prompt(edits, call, workplace):
    words = [word for name in edits for word in ("--candidate", name)]
    code, out, _ = call("evaluate", "--model", "model", *words, "--json", "e.json")
    document = json.loads((workplace / "e.json").read_text())
    assert code == 0 and document["use"] == "test" and document["prompts"]["harmful"] == 3
    merged, adapter, copy = document["candidates"]
    saved = json.loads((workplace / "edit-merged" / "reproduce.json").read_text())
    for name in ("refusals", "teacher_forced_kl", "false_refusals"):
        expected = saved["test_scores"][name]["saved"]["value"]
        assert merged["scores"][name]["value"] == pytest.approx(expected, rel=1e-6), name
        assert adapter["scores"][name]["value"] == pytest.approx(expected, rel=1e-3), name
        assert copy["minus_original"][name]["mean"] == 0
        pair = merged["minus_original"][name]
        difference = merged["scores"][name]["value"] - document["scores"][name]["value"]
        assert pair["mean"] == pytest.approx(difference, abs=1e-12)
    assert copy["scores"]["teacher_forced_kl"]["value"] == 0
    assert merged["minus_first"] == {}
    back = copy["minus_first"]["teacher_forced_kl"]["mean"]
    assert back == pytest.approx(-merged["minus_original"]["teacher_forced_kl"]["mean"])
    for line in (
        "refusals on the test prompts",
        "edit-lora",
        "minus the first",
        "paired by prompt",
    ):
        assert line in out


def test_a_score_that_is_no_number_is_null_in_the_file(call, workplace):
    text = TEMPLATE.replace("sum(values) / len(values)", "float('nan')")
    (workplace / "odd.py").write_text(text, encoding="utf-8")
    words = ["--scorers.odd.use", f"{workplace / 'odd.py'}:NewScorer", "--json", "odd.json"]
    words += ["--html", "odd.html"]
    words += ["--scorers.odd.role", "monitor", "--model", "model", "--candidate", "model"]
    code, _, err = call("evaluate", *words)
    assert code == 0, err
    document = json.loads((workplace / "odd.json").read_text(encoding="utf-8"))
    assert document["scores"]["odd"]["value"] is None and "odd" in document["settings"]["scorers"]


def test_the_page_shows_what_was_measured(edits, call, workplace):
    words = ["--model", "model", "--candidate", str(workplace / "edit-merged"), "copy"]
    code, out, _ = call("evaluate", *words, "--html", "out/e.html", "--json", "e.json")
    assert code == 0 and "refusals on the test prompts" in out
    page = (workplace / "out" / "e.html").read_text("utf-8")
    document = json.loads((workplace / "e.json").read_text())
    for candidate in document["candidates"]:
        for score in candidate["scores"].values():
            assert score["text"] in page
        assert len(candidate["responses"]["harmless"]) == 3
        assert "harmful" not in candidate["responses"]
    assert document["responses"]["harmless"] == document["candidates"][1]["responses"]["harmless"]
    assert 'id="figure-front"' in page and 'id="figure-positions"' in page
    assert str(workplace) not in page and "edit-merged" in page
    assert "only whether they are refused; --harmful-responses shows them" in page
    assert document["facts"]["prompts"][0]["sha256"][:16] in page

    printed = html.unescape(page.partition('aria-label="Command">')[2].partition("</pre>")[0])
    program, *again = shlex.split(printed)
    assert program == "heretic-kl" and again[:3] == ["evaluate", "--model", "model"]
    code, _, _ = call(*again, "--html", "again.html", "--json", "a.json", "--harmful-responses")
    repeated = json.loads((workplace / "a.json").read_text())
    assert code == 0 and repeated["scores"] == document["scores"]
    for ours, theirs in zip(repeated["candidates"], document["candidates"], strict=True):
        assert ours["scores"] == theirs["scores"] and len(ours["responses"]["harmful"]) == 3
    assert "harmful prompt 3" in (workplace / "again.html").read_text("utf-8")


def test_a_gguf_file_is_a_candidate(call, workplace):
    """Read by transformers: as exact as its numbers are."""
    pytest.importorskip("gguf")
    from score.gguf_models import make_original

    from heretic_kl.testing.gguf_file import write_llama_gguf

    make_original(workplace / "gguf")
    words = ["evaluate", "--model", "gguf/original", "--json", "gguf.json"]
    for dtype in ("F32", "BF16"):
        write_llama_gguf(workplace / "gguf/original", workplace / f"{dtype}.gguf", dtype=dtype)
        words += ["--candidate", f"{dtype}.gguf"]
    code, out, err = call(*words)
    assert code == 0, err
    same, rounded = json.loads((workplace / "gguf.json").read_text())["candidates"]
    for scorer, pair in same["minus_original"].items():
        assert abs(pair["mean"]) < 1e-6, scorer
    kl = "teacher_forced_kl"
    assert abs(same["scores"][kl]["value"]) < 1e-9 < rounded["scores"][kl]["value"] < 1e-2
    assert "F32.gguf" in out and "BF16.gguf" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--harmful-responses"], "has no effect without --html FILE"),
        (["--html", "model"], "a folder of that name exists; name a file"),
        (["--html", "a.txt/e.html"], "cannot be written"),
        (["--html", "e.json", "--json", "e.json"], "is where --json goes already"),
    ],
)
def test_targets_are_checked_before_a_model_is_loaded(call, words, message, monkeypatch):
    monkeypatch.setattr("heretic_kl.run.setup.load.load", None)
    code, _, err = call("evaluate", "--model", "model", "--candidate", "copy", *words)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.fixture
def revisions(workplace, tmp_path, monkeypatch):
    """org/x in a cache of the hub: `v1` is the original, `v2` has other weights."""
    repository = tmp_path / "hub" / "models--org--x"
    (repository / "refs").mkdir(parents=True)
    save_tiny_model(tmp_path / "other", tiny_llama(), seed=5)
    for tag, folder in (("v1", workplace / "model"), ("v2", tmp_path / "other")):
        commit = f"{int(tag[1]):040x}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs" / tag).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_candidates_of_the_hub_may_name_their_revision(revisions, call, workplace):
    words = ["--candidate", "org/x@v1", "org/x@v2", "--json", "r.json"]
    for command in (
        ("evaluate", "--model", "model"),
        ("score", "--reference", "org/x@v1", "--prompts", "a.txt", "--no-noise-floor"),
    ):
        code, _, err = call(*command, *words)
        assert code == 0, err
        document = json.loads((workplace / "r.json").read_text())
        first, second = document["candidates"]
        assert (first["name"], second["name"]) == ("org/x@v1", "org/x@v2")
        if command[0] == "evaluate":
            scores = [c["scores"]["teacher_forced_kl"]["value"] for c in (first, second)]
        else:
            scores = [c["mean"] for c in (first, second)]
        assert scores[0] == 0 < scores[1]
    code, _, err = call("evaluate", "--model", "model", "--candidate", "org/x@v3")
    assert code == 1 and err.count("\n") == 1 and "org/x" in err


def test_another_tokenizer_and_missing_models_are_one_line(edits, call, workplace):
    assert "name what is measured with --candidate" in call("evaluate", "--model", "model")[2]
    code, _, err = call("evaluate", "--model", "model", "--candidate", "./nothing")
    assert code == 1 and "no model at './nothing'" in err
    other = workplace / "stranger"
    shutil.copytree(workplace / "model", other)
    text = (other / "tokenizer.json").read_text().replace('"cake"', '"cakes"')
    (other / "tokenizer.json").write_text(text)
    code, _, err = call("evaluate", "--model", "model", "--candidate", "stranger")
    assert code == 1 and "cannot be compared with the original: another tokenizer" in err


def test_a_paired_difference_is_of_the_same_prompts():
    pair = paired_difference([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0])
    assert pair.mean == 0.5 and pair.prompts == 4
    assert pair.interval[0] <= 0.5 <= pair.interval[1]
    swapped = paired_difference([0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0])
    assert swapped.mean == -pair.mean
    assert not paired_difference([1.0, 2.0], [1.0, 2.0]).distinguishable
    with pytest.raises(ValueError, match="no pairs"):
        paired_difference([1.0], [1.0, 2.0])
