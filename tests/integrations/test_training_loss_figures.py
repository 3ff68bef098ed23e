"""What docs/integrations.md says of the training loss: code that runs, measured figures."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from heretic_kl.testing import tiny_llama

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/training_loss.json"


def section():
    guide = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")
    return guide.split("## As a training loss\n")[1].split("\n## ")[0]


def test_the_trainer_runs_as_shown(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", section(), re.DOTALL)
    ids = list(range(4, 12))
    rows = [{"input_ids": ids, "attention_mask": [1] * 8, "labels": ids}] * 4
    given = {
        "model": AutoModelForCausalLM.from_config(tiny_llama()),
        "dataset": rows,
        "benign": rows,
        "arguments": TrainingArguments(
            str(tmp_path),
            max_steps=2,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    }
    exec(code, given)
    assert [row["beta_kl"] for row in given["trainer"].state.log_history[:2]] == [0.3, 0.3]


def test_every_keyword_is_documented():
    import inspect

    from heretic_kl.integrations import TeacherForcedKLMixin

    parameters = inspect.signature(TeacherForcedKLMixin).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    documented = re.findall(r"^\| `(\w+)` \| [^|]*\|[^|]*\|$", section(), re.MULTILINE)
    assert documented == keywords


def test_the_table_is_that_of_the_results_file():
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = [line for line in section().splitlines() if line.startswith("|")]
    start = rows.index(result["table"][0])
    assert rows[start : start + len(result["table"])] == result["table"]
    text = " ".join(section().split())
    assert result["command"] in text
    sizes = result["sizes"]
    assert f"nats per response token, {sizes['held_out_main_pairs']} prompts" in text
    assert f"the term itself, {sizes['held_out_benign_responses']} prompts" in text
    assert f"at temperature 1, {sizes['test_prompts']} prompts" in text
    first, second = (r["gradient_norms"]["end"] for r in result["runs"] if r["beta_kl"] == 0)
    kl, main = (f"{first[name]:.2f} and {second[name]:.2f}" for name in ("kl", "main"))
    assert f"is {kl} in norm beside {main} of the main loss" in text


def test_the_summary_is_that_of_the_runs():
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    for row in result["summary"]:
        own = [run for run in result["runs"] if run["beta_kl"] == row["beta_kl"]]
        assert [run["seed"] for run in own] == result["seeds"]
        for name in ("main_loss", "benign_objective", "teacher_forced_kl"):
            values = torch.tensor([run[name] for run in own], dtype=torch.float64)
            assert row[name] == pytest.approx(values.mean().item())
        assert row["refusals"] == [run["refusals"] for run in own]
