"""What docs/integrations.md shows is code that runs."""

import re
import warnings
from pathlib import Path

import optuna
import pytest
import torch

from heretic_kl.testing import save_tiny_model, tiny_llama, tiny_tokenizer

GUIDE = Path(__file__).parents[2] / "docs" / "integrations.md"


@pytest.fixture
def given(tmp_path):
    from transformers import AutoModelForCausalLM, TrainingArguments

    tokens = torch.arange(4, 12)
    folder = save_tiny_model(tmp_path / "m", tiny_llama())
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "tokenizer": tiny_tokenizer(),
        "dataset": [{"input_ids": tokens, "labels": tokens}] * 4,
        "arguments": TrainingArguments(
            str(tmp_path / "out"),
            max_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    }


def block(heading):
    """The Python of one section."""
    section = GUIDE.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return code.replace("n_trials=20", "n_trials=3")


def test_the_objective_runs_as_shown(given):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        exec(block("As an objective in Optuna"), given)
    finally:
        optuna.logging.set_verbosity(before)
    assert len(given["study"].trials) == 3 and given["front"]


def test_the_callback_runs_as_shown(given, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(block("As a curve while training"), given)
    assert [step for step, _ in given["callback"].history] == [0, 2]
    assert "0 0 ± 0 nats" in capsys.readouterr().out


def test_the_settings_of_the_plug_in_are_the_documented_ones():
    from heretic_kl.integrations import HERETIC_PLUGIN

    code = Path(HERETIC_PLUGIN.rsplit(":", 1)[0]).read_text(encoding="utf-8")
    body = code.split("class TeacherForcedKLSettings(BaseModel):")[1].split("\nclass ")[0]
    section = GUIDE.read_text(encoding="utf-8").split("## As a scorer")[1].split("\n## ")[0]
    assert re.findall(r"^    (\w+): ", body, re.MULTILINE) == re.findall(
        r"^\| `(\w+)` \|", section, re.MULTILINE
    )
