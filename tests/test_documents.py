"""What the README and the guides show is true: code runs, commands parse, links lead somewhere."""

import ast
import re
import shlex
import sys
import warnings
from pathlib import Path

import optuna
import pytest
import torch

from heretic_kl import config
from heretic_kl.cli.command import SUMMARIES, load_command, wants_help
from heretic_kl.cli.output import take_json_flag
from heretic_kl.config import load_settings, read_settings
from heretic_kl.engine import Engine
from heretic_kl.prompts import Prompt
from heretic_kl.scoring import ScorerSpec, Suite
from heretic_kl.testing import (
    fake_context,
    load_tiny_model,
    save_tiny_model,
    tiny_llama,
    tiny_tokenizer,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md")))
}
FEW = {use: {"limit": 4} for use in ("train", "validation", "test")}
SMALL_RUN = {
    "trials": 2,
    "max_response_tokens": 3,
    "batch_size": 4,
    "prompts": dict.fromkeys(("harmful", "harmless", "borderline"), FEW),
    "directions": {"by_response": False},  # a tiny model refuses nothing
    "scorers": {"teacher_forced_kl": {"settings": {"set_aside_refused": False}}},
}


def blocks(language, documents=DOCUMENTS):
    """(document, code) of every fenced block of a language."""
    fence = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
    return [
        (name, code)
        for name, text in documents.items()
        for tag, code in fence.findall(text)  # of every language, so that fences stay paired
        if tag == language
    ]


def shown(blocks_shown):
    return [pytest.param(code, id=f"{name}-{i}") for i, (name, code) in enumerate(blocks_shown)]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def small_runs(monkeypatch):
    """Settings of a run are as shown, but for fewer trials, prompts and tokens."""

    class Small(config.Settings):
        def __init__(self, **values):
            super().__init__(**{**values, **SMALL_RUN})

    monkeypatch.setattr(config, "Settings", Small)


@pytest.fixture
def quiet_optuna():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def surroundings(tmp_path):
    """What the guides take for granted: a model, its tokenizer, data and training arguments."""
    from transformers import AutoModelForCausalLM, TrainingArguments

    ids = torch.arange(4, 12)
    folder = save_tiny_model(tmp_path / "model", tiny_llama())
    items = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}] * 4
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "tokenizer": tiny_tokenizer(),
        "dataset": items,
        "benign": items,
        "arguments": TrainingArguments(
            str(tmp_path / "trained"),
            max_steps=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    }


@pytest.mark.parametrize("code", shown(blocks("python")))
def test_every_python_block_runs_to_its_end(
    code, tmp_path, small_runs, quiet_optuna, surroundings, capsys
):
    for seed, name in enumerate(("model", "original", "fine-tune")):
        folder = save_tiny_model(tmp_path / f"tiny-{name}", tiny_llama(), seed=seed)
        code = code.replace(f"path/to/{name}", str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other libraries
        exec(code.replace("n_trials=20", "n_trials=3"), {"__name__": "shown", **surroundings})


def test_the_example_run_saves_a_model(tmp_path, small_runs):
    (code,) = (code for _, code in blocks("python") if "Session(" in code)
    exec(code.replace("path/to/model", str(save_tiny_model(tmp_path / "m", tiny_llama()))), {})
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_measurement_in_three_lines_prints_a_kl(tmp_path, capsys):
    (code,) = (code for _, code in blocks("python") if "import TeacherForcedKL\n\nkl =" in code)
    for seed, name in enumerate(("original", "fine-tune")):
        folder = save_tiny_model(tmp_path / name, tiny_llama(), seed=seed)
        code = code.replace(f"path/to/{name}", str(folder))
    exec(code, {})
    assert " nats, 95% " in capsys.readouterr().out


def test_the_example_scorer_scores(tmp_path):
    (code,) = (code for _, code in blocks("python") if "class Brevity" in code)
    file = tmp_path / "my_scorers.py"
    file.write_text(code, encoding="utf-8")
    engine = Engine(load_tiny_model(save_tiny_model(tmp_path / "m", tiny_llama())), batch_size=4)
    prompts = (Prompt("make a cake"), Prompt("tell me about Rome"))
    specs = [
        ScorerSpec("refusals", "refusals", "minimize", {}),
        ScorerSpec("brevity", f"{file}:Brevity", "monitor", {}),
    ]
    suite = Suite(specs)
    by_kind = {"harmful": prompts, "harmless": prompts}
    suite.prepare(fake_context(engine, prompts_by_kind=by_kind))
    assert suite.evaluate(engine, None)["brevity"].text.endswith(" words")


SETTINGS_PAGE = {"docs/settings.md": DOCUMENTS["docs/settings.md"]}


@pytest.mark.parametrize("text", shown(blocks("toml", SETTINGS_PAGE)))
def test_settings_in_the_guide_are_known(text, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    assert load_settings(["--config", str(file)])


COMMAND_LINES = sorted(
    {
        line.strip()
        for _, block in blocks("")
        for line in block.splitlines()
        if line.strip().startswith("heretic-kl ")
    }
)


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_line_parses(line, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the examples are
    words = shlex.split(line, comments=True)[1:]
    name = "optimize" if words[0].startswith("-") else words.pop(0)
    assert name in SUMMARIES
    command = load_command(name)
    words, _ = take_json_flag(words, may_name_file=command.json_may_name_file)
    if wants_help(words)[0]:
        assert command.help(everything=True, commands=True)
    elif command.settings is None:
        assert not words
    else:
        assert read_settings(command.settings, command.words(words), command.preset)


def test_there_are_command_lines():
    assert {"score", "inspect"} <= {line.split()[1] for line in COMMAND_LINES}


def test_every_flag_and_setting_in_the_text_exists():
    helps = "\n".join(load_command(name).help(everything=True, commands=True) for name in SUMMARIES)
    guides = [
        text for name, text in DOCUMENTS.items() if re.match(r"README|docs/(?!log)[a-z]+\.md", name)
    ]
    flags = {flag for text in guides for flag in re.findall(r"`(--[a-z][a-z.-]+)", text)}
    assert len(flags) > 10
    assert {flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", helps)} == set()


def test_the_settings_of_refinement_are_the_documented_ones():
    table = DOCUMENTS["docs/refinement.md"].split("## Settings")[1]
    documented = dict(re.findall(r"^\| `refinement\.(\w+)` \| `?\"?([\w.]+)", table, re.MULTILINE))
    defaults = config.Settings().refinement.model_dump()
    assert documented == {name: str(value).lower() for name, value in defaults.items()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[name]):
        if "://" not in target and not target.startswith("#"):
            path, _, anchor = target.partition("#")
            file = (ROOT / name).parent / path
            assert file.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
                assert anchor in slugs, target


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if name != "CHANGELOG.md"])
def test_files_of_the_package_that_are_named_exist(name):
    homes = [ROOT, ROOT / "heretic_kl"]
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|json|toml|svg))`", DOCUMENTS[name]):
        if not path.startswith(("path/", "/")):
            assert any((home / path).exists() for home in homes), path


def test_each_step_of_the_walks_names_code_that_exists():
    steps = re.findall(
        r"^\| \d+ \|.*\| `([\w.]+)` \| `([\w/]+\.py)` \|$",
        DOCUMENTS["docs/architecture.md"],
        re.MULTILINE,
    )
    assert (
        len(steps) == len(re.findall(r"^\| \d+ \|", DOCUMENTS["docs/architecture.md"], re.M)) > 20
    )
    for symbol, path in steps:
        home = ROOT if path.startswith("scorers/") else ROOT / "heretic_kl"
        tree = ast.parse((home / path).read_text(encoding="utf-8"))
        nodes = tree.body
        for part in symbol.split("."):
            (node,) = (n for n in nodes if getattr(n, "name", None) == part)
            nodes = getattr(node, "body", [])


def test_every_dependency_has_its_reason():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[<>=;\s\[]", requirement)[0] for requirement in project["dependencies"]}
    rows = re.findall(r"^\| ([^|]+) \|", DOCUMENTS["docs/decisions/002-dependencies.md"], re.M)
    assert names <= {name for row in rows for name in re.split(r"[, ]+", row)}
