"""The README's examples are code that runs."""

import re
from pathlib import Path

import pytest

from heretic_kl.engine import Engine
from heretic_kl.prompts import Prompt
from heretic_kl.scoring import MeasuringContext, ScorerSpec, Suite
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_scorer_works(tmp_path):
    (code,) = (block for block in blocks("python") if "class Brevity" in block)
    file = tmp_path / "my_scorers.py"
    file.write_text(code, encoding="utf-8")
    engine = Engine(load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama())), batch_size=4)
    prompts = (Prompt("make a cake"), Prompt("tell me about Rome"))
    suite = Suite(
        [
            ScorerSpec("refusals", "refusals", "minimize", {}),
            ScorerSpec("brevity", f"{file}:Brevity", "monitor", {}),
        ]
    )
    suite.prepare(MeasuringContext(engine, {"harmful": prompts, "harmless": prompts}, 3, 8))
    assert suite.evaluate(engine, None)["brevity"].text.endswith(" words")


def test_the_measurement_in_three_lines_works(tmp_path, capsys):
    (code,) = (block for block in blocks("python") if "import TeacherForcedKL" in block)
    for seed, name in enumerate(("original", "fine-tune")):
        folder = save_tiny_model(tmp_path / name, tiny_llama(), seed=seed)
        code = code.replace(f"path/to/{name}", str(folder))
    exec(code, {})
    assert " nats, 95% " in capsys.readouterr().out


def test_the_example_run_saves_a_model(tmp_path, monkeypatch):
    """As it stands, but for the model and for fewer trials, prompts and tokens."""
    from heretic_kl import config

    (code,) = (block for block in blocks("python") if "Session(" in block)
    folder = save_tiny_model(tmp_path / "model", tiny_llama())
    limits = {use: {"limit": 4} for use in ("train", "validation", "test")}
    smaller = {
        "trials": 2,
        "max_response_tokens": 3,
        "batch_size": 4,
        "prompts": {"harmful": limits, "harmless": limits, "borderline": limits},
        "directions": {"by_response": False},
        "scorers": {"teacher_forced_kl": {"settings": {"set_aside_refused": False}}},
    }
    real = config.Settings
    monkeypatch.setattr(config, "Settings", lambda **values: real(**{**values, **smaller}))
    exec(code.replace("path/to/model", str(folder)), {})
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_example_settings_are_known():

    from heretic_kl.config import load_settings

    for index, block in enumerate(blocks("toml")):
        file = Path(f"readme-{index}.toml")
        file.write_text(block, encoding="utf-8")
        assert load_settings(["--config", str(file)])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_path_in_the_file_map_exists():
    table = README.split("## What is where")[1].split("## Limits")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    paths = [path for cell in cells for path in re.findall(r"`([^`]+)`", cell)]
    assert len(paths) > 20
    for path in paths:
        candidates = [ROOT / path, ROOT / "heretic_kl" / path]
        assert any(candidate.exists() for candidate in candidates), path


def test_the_demo_figures_are_those_of_the_results_file():
    import json

    scores = json.loads((ROOT / "benchmarks/results/demo.json").read_text())["test_scores"]
    for which in ("original", "saved"):
        for name in ("refusals", "false_refusals"):
            assert scores[name][which]["text"].split(" (")[0] in README
    saved = scores["teacher_forced_kl"]["saved"]
    assert f"{saved['value']:.3f} ± {saved['standard_error']:.3f}" in README


def test_the_cost_of_a_measurement_is_that_of_the_results_file():
    import json

    found = json.loads((ROOT / "benchmarks/results/measurement.json").read_text())
    memory, time = found["memory"], found["time"]
    text = " ".join(README.split())
    assert f"takes {memory['median_extra_mb']:.0f} MB more than the forward pass" in text
    assert f"take {memory['all_logits_would_be_mb']:,.0f} MB" in text
    assert f"take {time['measurement_over_bare_forward']:.2f} times a bare forward" in text


def test_seconds_beside_peers_are_those_of_the_results_file():
    import json

    found = json.loads((ROOT / "benchmarks/results/peers.json").read_text())
    forced, generation = found["teacher_forced"], found["generation"]
    peer, ours = forced["temaq"]["median_seconds"], forced["ours"]["median_seconds"]
    assert f"Temaq 1.1.1 {peer:.2f} s" in README
    for name in ("0, 1", "0, 8", "8, 1", "12, 4"):
        seconds = ours[f"from layer {name} at once"]
        assert f"{seconds:.2f} s ({peer / seconds:.1f} times as many)" in README
    peer = generation["heretic"]["median_seconds"]
    assert f"Heretic 1.4.0 {peer:.2f} s" in README
    for name in ("ours", "ours_4_at_once"):
        seconds = generation[name]["median_seconds"]
        assert f"{seconds:.2f} s ({peer / seconds:.1f} times as many)" in README
    strong = generation["ours"]
    seconds, left = strong["seconds"][2], strong["refusals"][2]
    assert f"{seconds:.1f} s for one that leaves {left} refusal" in README
    mean = peer / strong["mean_seconds"]
    assert f"medians ours alone are {mean:.1f} times as many" in README


def test_float32_beside_peers_is_that_of_the_results_file():
    import json

    found = json.loads((ROOT / "benchmarks/results/peers_float32.json").read_text())
    forced, generation = found["teacher_forced"], found["generation"]
    ours = forced["ours"]["median_seconds"]["from layer 0, 1 at once"]
    text = " ".join(README.split())
    assert (
        f"ours are {forced['temaq']['median_seconds'] / ours:.1f} times as many as Temaq's" in text
    )
    alone, four = (
        generation["heretic"]["median_seconds"] / generation[name]["median_seconds"]
        for name in ("ours", "ours_4_at_once")
    )
    assert f"{alone:.1f} times as many as Heretic's alone, {four:.1f} times with 4" in text
    same = generation["ours"]["trials_with_verdicts_of_plain_generation"]
    assert f"in {same} of {generation['ours']['trials']} trials" in text


def test_verdicts_are_those_of_the_results_file():
    import json

    found = json.loads((ROOT / "benchmarks/results/verdicts.json").read_text())
    text, control = " ".join(README.split()), "of plain generation in batches of 13"
    for dtype in ("float32", "bfloat16"):
        ours = found[dtype]["of a run, unlike plain generation's"]
        plain = found[dtype][f"{control}, unlike plain generation's"]
        assert f"{ours} of {found[dtype]['verdicts']} in {dtype} ({plain} " in text


def test_what_racing_saves_is_that_of_the_results_file():
    import json

    found = json.loads((ROOT / "benchmarks/results/racing.json").read_text())["searches"]
    whole, raced = found["measured whole"], found["racing by exact bounds"]
    rates = f"{raced['trials_per_minute']:.0f} a minute instead of {whole['trials_per_minute']:.0f}"
    text = " ".join(README.split())
    assert f"{raced['trials']} trials it stopped {raced['stopped']} of them and ran {rates}" in text


def test_coverage_and_memory_of_saving_are_those_of_the_results_files():
    import json

    found = json.loads((ROOT / "benchmarks/results/coverage.json").read_text())["summary"]
    text = " ".join(README.split())
    assert f"Of the {found['types'] - found['not built here']} decoder types" in text
    assert f"random models, {found['passed']} pass" in text
    assert f"the same logits, and {found['refused']} are refused" in text
    assert found["failed"] == 0
    cases = json.loads((ROOT / "benchmarks/results/export.json").read_text())["cases"].values()
    for case in cases:
        assert all(f"{extra:.0f} MB beyond" in text for extra in case["extra_peak_mb"])
