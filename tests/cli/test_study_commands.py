"""A finished study from the command line: listed, shown and saved without a search; JSON lines."""

import json
from pathlib import Path

import jsonschema
import pytest

from heretic_kl.cli import main as cli
from heretic_kl.testing import save_tiny_model, tiny_llama
from heretic_kl.ui.json_lines import event_schema

WORDS = "how do I make a cake please tell me about the weather in Rome first mix flour".split()


def config(folder):
    """A run of seconds on a tiny model, which refuses nothing: odd words are the markers."""
    lines = ["trials = 4", "startup_trials = 9", 'device = "cpu"', 'dtype = "float32"']
    lines += ["max_response_tokens = 6", "batch_size = 4", 'response_prefix = ""', "refine = false"]
    lines += [f'model = "{folder / "model"}"', "test_trials = 1", 'prompt_set = "builtin"']
    lines += ["directions.by_response = false"]
    lines += ['scorers.refusals.settings.markers = ["flour", "mix"]']
    lines += ["scorers.teacher_forced_kl.settings.set_aside_refused = false"]
    for kind, name in (("harmful", "a"), ("harmless", "b"), ("borderline", "b")):
        for use, part in (("train", "[:6]"), ("validation", "[6:9]"), ("test", "[9:]")):
            table = f'{{source = "{folder / name}.txt", split = "{part}"}}'
            lines.append(f"prompts.{kind}.{use} = {table}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a model, prompts and config.toml."""
    folder = tmp_path_factory.mktemp("commands")
    save_tiny_model(folder / "model", tiny_llama())
    for index, name in enumerate("ab"):
        lines = [" ".join(WORDS[(i + index) % 9 :][: 3 + i % 5]) for i in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "config.toml").write_text(config(folder), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _there(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def call(capsys, *words):
    """Exit code, stdout, stderr of one command."""
    capsys.readouterr()
    code = cli.main(list(words))
    return code, *capsys.readouterr()


def events(capsys, *words):
    """Exit code and the events of a command with --json, each checked against the schema."""
    code, out, _ = call(capsys, *words, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    checker = jsonschema.Draft202012Validator(event_schema())
    for line in lines:
        checker.validate(line)
        assert out.isascii()
    assert lines[-1] == {"v": 1, "event": "ended", "exit_code": code}
    return code, lines


@pytest.fixture(scope="module")
def searched(workplace):
    """The events of one search."""
    import contextlib
    import io
    import os

    os.chdir(workplace)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["--json", "--study-name", "mine"]) == 0
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    checker = jsonschema.Draft202012Validator(event_schema())
    for line in lines:
        checker.validate(line)
    return lines


def test_a_search_tells_a_program_everything(searched):
    names = [line["event"] for line in searched]
    assert names.count("trial_finished") == 4 and names[-1] == "ended"
    for name in ("model_loaded", "calibration_step", "study_opened", "trial_tested"):
        assert name in names
    (front,) = [line for line in searched if line["event"] == "front_shown"]
    last = [line for line in searched if line["event"] == "trial_finished"][-1]
    assert front["front"] == last["front"] and front["study"] == "mine"


def test_trials_lists_what_the_search_found(searched, capsys):
    code, lines = events(capsys, "trials", "mine")
    finished = [line["record"] for line in searched if line["event"] == "trial_finished"]
    shown = [line for line in lines if line["event"] == "trial_shown"]
    assert code == 0 and [line["record"] for line in shown] == finished
    (front,) = [line["front"] for line in lines if line["event"] == "front_shown"]
    assert [line["record"]["number"] for line in shown if line["on_front"]] == sorted(front)
    code, out, err = call(capsys, "trials", "--all")
    assert (code, err) == (0, "") and "study mine: 4 complete" in out
    assert out.count("complete  ") == 4 and "← knee" in out


def test_show_prints_one_trial(searched, capsys):
    code, out, _ = call(capsys, "show", "mine", "--trial", "2")
    assert code == 0 and out.startswith("Trial 2\n") and "direction" in out
    code, lines = events(capsys, "show", "--pick", "knee")
    assert code == 0 and lines[0]["event"] == "trial_shown" and lines[0]["on_front"]


def test_save_writes_a_trial_without_a_search(searched, capsys, workplace):
    code, lines = events(capsys, "save", "mine", "--trial", "2", "-o", "saved")
    names = [line["event"] for line in lines]
    assert code == 0 and "trial_finished" not in names
    (saved,) = [line for line in lines if line["event"] == "model_saved"]
    assert saved["folder"] == "saved" and saved["merge_kl"] <= saved["noise_floor"]
    assert (workplace / "saved" / "model.safetensors").is_file()
    code, out, _ = call(capsys, "trials", "mine")
    assert code == 0 and "test" in out  # what was measured on the way is kept


def test_a_rule_that_no_trial_meets_has_a_code_of_its_own(searched, capsys, workplace):
    for words in (["save", "mine"], ["--study-name", "mine"]):
        words = [*words, "--pick", "max-refusals=-1", "--save", "none"]
        code, lines = events(capsys, *words)
        (failed,) = [line["lines"] for line in lines if line["event"] == "failed"]
        assert code == 3 and "the nearest is trial " in failed[0] and "--trial " in failed[0]
        assert not (workplace / "none").exists()
    assert call(capsys, "show", "--trial", "99")[0] == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["show"], 2, "say which trial: --trial NUMBER or --pick RULE"),
        (["save", "mine", "--trial", "1", "--pick", "knee"], 2, "both name a trial"),
        (["trials", "mne"], 1, "no study 'mne' in 'studies'; did you mean mine?"),
        (["show", "--pick", "best"], 1, "unknown pick rule 'best'"),
        (["trials", "--trails", "1"], 2, "unknown flag --trails"),
        (["save", "--trial", "1", "--config", "config.toml"], 2, "the study has settings"),
    ],
)
def test_mistakes_are_one_line_and_one_event(searched, capsys, words, code, message):
    assert call(capsys, *words)[0] == code
    code_as_event, lines = events(capsys, *words)
    assert code_as_event == code and lines[0]["event"] == "failed"
    assert len(lines[0]["lines"]) == 1 and message in lines[0]["lines"][0]


def test_every_other_command_writes_json_too(capsys, workplace):
    code, lines = events(capsys, "inspect", str(workplace / "model"))
    assert code == 0 and lines[-2]["event"] == "result" and lines[-2]["command"] == "inspect"
    model = str(workplace / "model")
    words = ["--reference", model, "--candidate", model, "--prompts", str(workplace / "a.txt")]
    code, lines = events(capsys, "score", *words, "--kl-tokens", "2")
    assert code == 0 and lines[-2]["content"]["candidates"][0]["mean"] == 0
    for name in ("config", "events"):
        assert events(capsys, name)[1][0]["command"] == name
    assert events(capsys, "no-such-command")[0] == 2


def test_the_schema_is_printed(capsys):
    code, out, _ = call(capsys, "events")
    assert code == 0 and json.loads(out) == event_schema()
    page = (Path(cli.__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    names = {
        table["properties"].get("event", {}).get("const")
        for table in event_schema()["$defs"].values()
    }
    assert {name for name in names - {None} if f"`{name}`" not in page} == set()
