"""A task of lm-eval, from a local folder, on a trial and the original; the same as a scorer."""

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


def test_a_metric_that_a_task_lacks_is_one_line(workplace):
    lm = load_tiny_model(workplace / "model")
    with pytest.raises(ScorerError, match="no metric 'bleu'; there are acc"):
        HarnessTask("cakes", "bleu", "tasks")(lm.model, lm.chat.tokenizer)
