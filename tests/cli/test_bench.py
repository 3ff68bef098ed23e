"""A task of lm-eval, from a local folder, on a trial and the original; the same as a scorer."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from heretic_kl.engine import Engine
from heretic_kl.errors import ScorerError
from heretic_kl.scoring import HarnessTask, ScorerSpec, Suite
from heretic_kl.testing import fake_context, load_tiny_model

pytest.importorskip("lm_eval")


@pytest.fixture(autouse=True)
def _tasks(there, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(Path(__file__).parent / "tasks", there / "tasks", dirs_exist_ok=True)


def test_a_trial_stands_beside_the_original(searched, events, call):
    words = ["bench", "mine", "--trial", "2", "--task", "cakes", "--tasks-folder", "tasks"]
    code, lines = events(*words)
    assert code == 0, lines
    (content,) = [line["content"] for line in lines if line["event"] == "result"]
    original, (trial,) = content["scores"]["cakes"], content["candidates"]
    assert trial["name"] == "trial 2" and original["details"]["documents"] == 8
    pair = trial["minus_original"]["cakes"]
    difference = trial["scores"]["cakes"]["value"] - original["value"]
    assert pair["prompts"] == 8 and pair["mean"] == pytest.approx(difference)


def test_what_is_wrong_with_a_task_is_one_line_before_a_model_is_loaded(searched, call, there):
    words = ["bench", "mine", "--trial", "2", "--tasks-folder", "tasks"]
    assert call(*words)[0] == 2
    (there / "tasks" / "cakes.jsonl").unlink()
    code, _, err = call(*words, "--task", "cakes")
    assert code == 1 and "lm-eval task 'cakes' cannot be loaded: " in err
    assert err.count("\n") == 1


def test_a_task_is_a_score_with_the_edit_in_force(workplace):
    from heretic_kl.ablation import Operator

    lm = load_tiny_model(workplace / "model")
    engine = Engine(lm, batch_size=4)
    settings = {"task": "cakes", "tasks": "tasks", "metric": "acc", "batch_size": 4}
    suite = Suite([ScorerSpec("cakes", "lm_eval", "maximize", settings)])
    suite.prepare(fake_context(engine))
    before = suite.evaluate(engine, None)
    direct = HarnessTask("cakes", "acc", "tasks")(lm.model, lm.chat.tokenizer)
    assert before["cakes"].per_prompt == direct and set(direct) <= {0.0, 1.0}
    site = lm.architecture.sites[-1]
    left, right = torch.randn(2, len(site.weight()), 1, generator=torch.manual_seed(0))
    plans = [{site.key: Operator(left * size, right)} for size in (0.0, 9.0)]
    same, other = suite.evaluate_objectives(engine, plans)
    assert same["cakes"] == before["cakes"] and other["cakes"] != before["cakes"]
    assert suite.evaluate(engine, None) == before  # nothing of an edit stays


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [([], "strict-match", 0.0), (["--filter", "flexible-extract"], "flexible-extract", 1.0)],
)
def test_one_filter_of_several_is_taken_and_named(searched, call, there, words, name, value):
    """Not the mean of both: each document counts once."""
    bench = ["bench", "mine", "--trial", "2", "--task", "sums", "--tasks-folder", "tasks"]
    code, out, err = call(*bench, *words, "--json", "b.json")
    content = json.loads((there / "b.json").read_text())
    assert code == 0, err
    for scores in (content["scores"], content["candidates"][0]["scores"]):
        assert scores["sums"]["value"] == value
        assert scores["sums"]["details"] == {
            "documents": 8,
            "metric": "exact_match",
            "filter": name,
        }
        assert f"(8 documents, filter {name})" in scores["sums"]["text"]
    assert content["candidates"][0]["minus_original"]["sums"]["prompts"] == 8
    assert f"exact_match {value:.3f}" in out and f"filter {name}" in out
    assert "sums has no metric acc: exact_match is taken" in err
    assert ("sums has several filters: strict-match, the first, is taken" in err) == (not words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metric", "bleu"], "'sums' has no metric 'bleu'; there are exact_match"),
        (
            ["--filter", "loose"],
            "'sums' has no filter 'loose'; there are strict-match, flexible-extract",
        ),
    ],
)
def test_a_wrong_metric_or_filter_is_one_line_before_a_model_is_loaded(
    searched, call, words, message, monkeypatch
):
    monkeypatch.setattr("heretic_kl.run.setup.load.load", None)
    bench = ["bench", "mine", "--trial", "2", "--task", "sums", "--tasks-folder", "tasks"]
    code, _, err = call(*bench, *words)
    assert code == 1 and message in err and err.count("\n") == 1
    scorer = ["--scorers.sums.use", "lm_eval", "--scorers.sums.role", "monitor"]
    scorer += ["--scorers.sums.settings.task", "sums", "--scorers.sums.settings.tasks", "tasks"]
    name, value = words
    scorer += [f"--scorers.sums.settings.{name[2:]}", value]
    code, _, err = call("--trials", "1", *scorer)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("unsafe_code: true", "'sums' runs code that the model writes"),
        ("doc_to_image: [image]", "'sums' needs more than text"),
        (
            "metric_list: [{metric: bleu}, {metric: ter}]",
            "say which metric of lm-eval task 'sums': bleu, ter",
        ),
    ],
)
def test_a_task_that_cannot_be_run_is_one_line(change, message):
    path = Path("tasks/sums.yaml")
    text, key = path.read_text(), change.partition(":")[0]
    others = re.sub(rf"^{key}:.*\n(  .*\n)*", "", text, flags=re.MULTILINE)
    path.write_text(f"{others}{change}\n")
    with pytest.raises(ScorerError) as error:
        HarnessTask("sums", None, "tasks").settled()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_wrong_inside_lm_eval_is_one_line(workplace, monkeypatch):
    import lm_eval

    def evaluate(**_):
        raise ValueError("a document\nthat nobody can read")

    monkeypatch.setattr(lm_eval, "evaluate", evaluate, raising=False)
    lm = load_tiny_model(workplace / "model")
    with pytest.raises(ScorerError, match="run task 'cakes': a document that nobody can read"):
        HarnessTask("cakes", "acc", "tasks")(lm.model, lm.chat.tokenizer)


def test_a_metric_that_a_task_lacks_is_one_line():
    with pytest.raises(ScorerError, match="no metric 'bleu'; there are acc"):
        HarnessTask("cakes", "bleu", "tasks").settled()
    assert HarnessTask("cakes", folder="tasks").settled().metric == "acc"


def test_evaluate_runs_a_task_on_every_candidate(workplace, call, there):
    words = ["--scorers.sums.use", "lm_eval", "--scorers.sums.role", "monitor"]
    words += ["--scorers.sums.settings.task", "cakes", "--scorers.sums.settings.tasks", "tasks"]
    words += ["--model", "model", "--candidate", "model", "--json", "tasks.json"]
    code, out, err = call("evaluate", *words)
    assert code == 0, err
    content = json.loads((there / "tasks.json").read_text())
    (candidate,) = content["candidates"]
    assert content["scores"]["sums"]["text"].startswith("acc ") and "(8 documents)" in out
    assert candidate["scores"]["sums"] == content["scores"]["sums"]
    pair = candidate["minus_original"]["sums"]
    assert pair["prompts"] == 8 and pair["mean"] == 0 and "sums on the test prompts" in out
