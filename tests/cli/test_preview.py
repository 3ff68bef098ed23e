"""`show --preview`: what it reads, what it leaves alone, and what it says is not as it was."""

import json
from dataclasses import replace

import pytest
import torch

from heretic_kl.ablation import Operator, Refinement, SiteKey
from heretic_kl.scoring import scorer_code
from heretic_kl.search import PlanStore, read_study
from heretic_kl.testing import save_tiny_model, tiny_llama

PREVIEW = ("show", "mine", "--trial", "2", "--preview")


@pytest.fixture(scope="module")
def other(workplace):
    """A model of the same shape with other weights."""
    return save_tiny_model(workplace / "other", tiny_llama(), seed=5)


def notices(lines):
    texts = (line["message"] for line in lines if line["event"] == "notice")
    return [text for text in texts if "was made with another" in text]


def files(folder):
    """Names and contents of whatever is beside the studies."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_show_previews_responses_of_original_and_trial(searched, call, events, workplace):
    journal = workplace / "studies" / "mine.journal"
    content, words = journal.read_bytes(), ["show", "mine", "--trial", "2", "--preview"]
    code, lines = events(*words, "--max-response-tokens", "9")
    (result,) = [line for line in lines if line["event"] == "result"]
    pairs = result["content"]["responses"]
    assert code == 0 and (result["command"], result["content"]["trial"]) == ("show", 2)
    prompts = (workplace / "b.txt").read_text("utf-8").splitlines()[6:9]
    assert [pair["prompt"] for pair in pairs] == prompts, "harmless validation prompts"
    assert any(pair["original"]["text"] != pair["edited"]["text"] for pair in pairs)
    assert {"text", "degenerate"} == set(pairs[0]["edited"])
    assert "trial_finished" not in [line["event"] for line in lines]
    code, out, _ = call(*words, "-q")
    assert code == 0 and all(f"> {prompt}" in out for prompt in prompts) and "falling" not in out
    assert "edited, trial 2" in out and "original" in out
    assert journal.read_bytes() == content


def test_of_harmful_prompts_only_verdicts_are_shown(searched, call, events, workplace):
    words = ("show", "mine", "--trial", "2", "--preview", "harmful")
    code, lines = events(*words)
    (content,) = [line["content"] for line in lines if line["event"] == "result"]
    prompts = (workplace / "a.txt").read_text("utf-8").splitlines()[6:9]
    assert code == 0 and {*content} == {"study", "trial", "verdicts"}
    assert [pair["prompt"] for pair in content["verdicts"]] == prompts
    said = {pair[who] for pair in content["verdicts"] for who in ("original", "edited")}
    assert said <= {"refuses", "responds", "degenerate"}
    code, out, _ = call(*words, "-q")
    head, *rows = out.splitlines()
    assert code == 0 and head.split() == ["original", "edited", "prompt"]
    assert [row.split(maxsplit=2) for row in rows] == [
        [pair["original"], pair["edited"], pair["prompt"]] for pair in content["verdicts"]
    ]


def test_the_verdicts_are_by_the_rule(searched, events, workplace):
    """Every word that the model knows is a marker of a refusal, or one that it does not know."""
    words = ("show", "mine", "--trial", "2", "--preview=harmful")
    known = " ".join((workplace / f"{name}.txt").read_text("utf-8") for name in "ab").split()
    for markers, expected in ((sorted({*known}), True), (["zebra"], False)):
        flags = ("--scorers.refusals.settings.markers", json.dumps(markers))
        (content,) = [e["content"] for e in events(*words, *flags)[1] if e["event"] == "result"]
        said = [pair[who] for pair in content["verdicts"] for who in ("original", "edited")]
        assert ("refuses" in said) == expected


def test_a_trial_is_measured_on_the_test_prompts_once(call, events, tmp_path, monkeypatch):
    where = ("--study-dir", str(tmp_path))
    assert events("--study-name", "untested", "--test-trials", "0", *where)[0] == 0
    show = ("show", "untested", "--trial", "2", *where)
    assert events(*show)[1][0]["test_scores"] is None
    before = read_study("untested", tmp_path).settings
    code, lines = events(*show, "--test")
    (tested,) = [line for line in lines if line["event"] == "trial_tested"]
    (shown,) = [line for line in lines if line["event"] == "trial_shown"]
    assert code == 0 and tested["record"]["number"] == 2
    texts = [
        {n: s["text"] for n, s in scores.items()}
        for scores in (shown["test_scores"], tested["scores"])
    ]
    assert texts[0] == texts[1] and {"refusals", "teacher_forced_kl"} <= {*texts[0]}
    study = read_study("untested", tmp_path)
    assert {*study.tested} == {2} and study.settings == before
    assert study.tested[2]["refusals"].value == tested["scores"]["refusals"]["value"]
    longer = ("--test", "--test-kl-tokens", "2")
    code, lines = events(*show, *longer)
    assert code == 0 and lines[-2]["test_scores"]["teacher_forced_kl"]["details"]["kl_tokens"] == 2
    monkeypatch.setattr("heretic_kl.run.Session", None)  # no model is loaded again
    code, out, _ = call(*show, "--test")
    assert code == 0 and "test prompts" in out and "over 2 positions" not in out
    code, out, _ = call(*show, *longer)
    assert code == 0 and "nats over 2 positions" in out


def test_a_study_of_other_settings_is_not_measured_further(searched, call):
    code, _, err = call("show", "mine", "--trial", "0", "--test", "--kl-tokens", "2")
    assert code == 1 and "kl_tokens" in err and "Traceback" not in err


def test_a_trial_without_an_edit_is_refused_before_a_model_is_loaded(searched, call, monkeypatch):
    def interrupted(study, rule):
        return replace(study.records[0], number=99, edit=None)

    monkeypatch.setattr("heretic_kl.cli.study.show.picked", interrupted)
    monkeypatch.setattr("heretic_kl.run.Session", None)
    for what in ("--preview", "--test"):
        code, _, err = call("show", "mine", "--trial", "99", what)
        assert code == 1 and "was interrupted and has no edit" in err


def test_a_preview_reads_the_studys_results_and_adds_none(events, tmp_path, computed):
    where = ("--study-dir", str(tmp_path))
    assert events("--study-name", "all", "--keep-responses", "all", *where)[0] == 0
    assert computed["passes"] and computed["prompts read"]
    preview, before = ("show", "all", "--trial", "2", "--preview", *where), files(tmp_path)
    computed.clear()
    code, lines = events(*preview)
    assert code == 0 and not notices(lines)
    assert not any(computed.values())
    assert "baseline_measured" not in [line["event"] for line in lines]
    assert files(tmp_path) == before
    assert events(*preview, "--dtype", "bfloat16")[0] == 0
    assert computed["passes"] and computed["prompts read"], "what does not fit is computed"
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--model", "other"], "model weights: "),
        (["--max-response-tokens", "9"], "max_response_tokens: 6 there, 9 here"),
        (["--scorers.refusals.settings.markers", '["mix"]'], "scorers.refusals.settings.markers: "),
        (["--scorers.refusals.enabled", "false"], "scorers.refusals"),
        (["--dtype", "bfloat16"], "dtype: float32 there, bfloat16 here"),
    ],
)
def test_a_preview_of_something_else_says_so(searched, other, events, words, difference):
    code, lines = events(*PREVIEW, *words)
    (notice,) = notices(lines)
    assert code == 0 and difference in notice and notice.startswith("study mine ")


def test_other_code_of_a_scorer_that_measures_nothing_is_no_difference(
    searched, events, monkeypatch
):
    def code_of(use):
        return "other" if use == "teacher_forced_kl" else scorer_code(use)

    monkeypatch.setattr("heretic_kl.run.setup.fingerprint.scorer_code", code_of)
    code, lines = events(*PREVIEW)
    assert code == 0 and not notices(lines)


def test_what_was_learned_of_another_model_is_one_line(searched, call, workplace, monkeypatch):
    plan = {SiteKey(99, "mlp", "nowhere"): Operator(torch.ones(8, 1), torch.ones(8, 1))}
    digest = PlanStore(workplace / "studies", "mine").save(plan)
    learned = Refinement(digest, start=2, steps=1, form="factors", rank=1, mass_limit=0.1)
    record = read_study("mine", workplace / "studies").records[2]
    edit = replace(record.edit, refinement=learned)
    refined = replace(record, edit=edit)
    monkeypatch.setattr("heretic_kl.cli.study.show.picked", lambda study, rule: refined)
    code, _, err = call(*PREVIEW)
    assert code == 1 and "the learned operators do not fit this model: nowhere" in err
    assert "Traceback" not in err
