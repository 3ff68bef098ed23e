"""A folder with a tiny model, prompts and a configuration, and commands run in it."""

import contextlib
import io
import json
import os

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
    lines += ["directions.by_response = false", "racing = false"]
    lines += ['scorers.refusals.settings.markers = ["flour", "mix"]']
    lines += ["scorers.teacher_forced_kl.settings.set_aside_refused = false"]
    for kind, name in (("harmful", "a"), ("harmless", "b"), ("borderline", "b")):
        for use, part in (("train", "[:6]"), ("validation", "[6:9]"), ("test", "[9:]")):
            table = f'{{source = "{folder / name}.txt", split = "{part}"}}'
            lines.append(f"prompts.{kind}.{use} = {table}")
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory):
    """A folder with a model, prompts and config.toml."""
    folder = tmp_path_factory.mktemp("commands")
    save_tiny_model(folder / "model", tiny_llama())
    for index, name in enumerate("ab"):
        lines = [" ".join(WORDS[(i + index) % 9 :][: 3 + i % 5]) for i in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "config.toml").write_text(config(folder), encoding="utf-8")
    return folder


@pytest.fixture
def there(workplace, monkeypatch):
    """Run commands in the workplace."""
    monkeypatch.chdir(workplace)
    return workplace


def checked(out):
    """The events of JSON lines, each checked against the schema."""
    lines = [json.loads(line) for line in out.splitlines()]
    checker = jsonschema.Draft202012Validator(event_schema())
    for line in lines:
        checker.validate(line)
    assert out.isascii()
    return lines


@pytest.fixture
def check_lines():
    """(stdout) -> its events, checked against the schema."""
    return checked


@pytest.fixture
def call(there, capsys):
    """(words) -> exit code, stdout, stderr of one command."""

    def run(*words):
        capsys.readouterr()
        code = cli.main(list(words))
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def events(call):
    """(words) -> exit code and events of a command with --json."""

    def run(*words):
        code, out, _ = call(*words, "--json")
        lines = checked(out)
        assert lines[-1] == {"v": 1, "event": "ended", "exit_code": code}
        return code, lines

    return run


@pytest.fixture(scope="session")
def searched(workplace):
    """The events of one search, whose study is called mine."""
    before, out = os.getcwd(), io.StringIO()
    os.chdir(workplace)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert cli.main(["--json", "--study-name", "mine"]) == 0
    os.chdir(before)
    return checked(out.getvalue())
