"""Exit codes, one-line errors, and what the command line does not import."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from heretic_kl._version import __version__
from heretic_kl.cli import main as cli
from heretic_kl.cli import optimize
from heretic_kl.cli.command import SUMMARIES, at_terminal
from heretic_kl.cli.config import default_configuration
from heretic_kl.cli.signals import Terminated, stopping_on_term
from heretic_kl.config import Settings
from heretic_kl.errors import StorageLostError, StudyError

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("HERETIC_KL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Settings, bool]]:
    """Take the place of the search, and keep what it was called with."""
    calls: list[tuple[Settings, bool]] = []

    def search(settings: Settings, *, demo: bool = False) -> int:
        calls.append((settings, demo))
        return 0

    monkeypatch.setattr(optimize, "search", search)
    return calls


def with_package() -> dict[str, str]:
    """Return an environment in which a new process finds the package, installed or not."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def raising(error: BaseException) -> Callable[..., int]:
    def search(settings: Any, *, demo: bool = False) -> int:
        raise error

    return search


@pytest.mark.parametrize("words", [["--model", "x"], ["optimize", "-m", "x"]])
def test_a_run_is_the_default_command(words: list[str], run: list[tuple[Settings, bool]]) -> None:
    assert cli.main([*words, "--kl-tokens", "5"]) == 0
    [(settings, demo)] = run
    assert (settings.model, settings.kl_tokens, demo) == ("x", 5, False)


def test_demo_has_a_preset_below_the_flags(run: list[tuple[Settings, bool]]) -> None:
    assert cli.main(["demo", "--pick", "trial=1"]) == 0
    [(settings, demo)] = run
    assert demo and settings.prompt_set == "builtin"
    assert (settings.pick, settings.save) == ("trial=1", Path("heretic-kl-demo/model"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "no model given: name one with --model"),
        (["--modle", "x"], "unknown flag --modle; did you mean --model?"),
        (["org/model"], "unknown command 'org/model'; a model is given as --model org/model"),
        (["dmo"], "unknown command 'dmo'; did you mean demo?"),
        (["run", "--model", "x"], "unknown command 'run'; it is now optimize"),
        (["demo", "-m", "x"], "`heretic-kl demo` runs on the demo model"),
        (["demo", "--model", "x"], "`heretic-kl demo` runs on the demo model"),
        (["config", "x"], "unexpected argument 'x'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    words: list[str], expected: str, capsys: Capture
) -> None:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("heretic-kl: error: ") and expected in err


def test_every_line_of_an_error_has_the_prefix(capsys: Capture) -> None:
    assert cli.main(["--sed", "1", "--modl", "x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("heretic-kl: error: ") for line in lines)


def test_other_errors_are_code_1(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(optimize, "search", raising(StudyError("studies/x: cannot be read")))
    assert cli.main(["--model", "x"]) == 1
    assert capsys.readouterr() == ("", "heretic-kl: error: studies/x: cannot be read\n")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(optimize, "search", raising(KeyboardInterrupt()))
    assert cli.main(["--model", "x"]) == 130
    err = capsys.readouterr().err
    assert "finished trials are kept in the study" in err and err.strip().count("\n") == 0


def test_an_interrupt_keeps_its_code_where_the_storage_is_gone(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def search(*arguments: object, **named: object) -> None:
        try:
            raise Terminated
        finally:
            raise StorageLostError("the storage cannot be reached")

    monkeypatch.setattr(optimize, "search", search)
    assert cli.main(["--model", "x"]) == 143
    assert "interrupted; finished trials are kept" in capsys.readouterr().err
    monkeypatch.setattr(optimize, "search", raising(StorageLostError("gone")))
    assert cli.main(["--model", "x"]) == 5


def test_term_stays_ignored_where_the_program_was_started_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with stopping_on_term():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_memory_that_runs_out_is_no_bug(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    import heretic_kl.model  # noqa: F401 (as a command does that can run out of memory)

    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(optimize, "search", raising(error))
    assert cli.main(["--model", "x"]) == 1
    assert capsys.readouterr().err == (
        "heretic-kl: error: out of memory: try a smaller --dtype, --device-map auto, or a larger "
        "device; finished trials are kept\n"
    )


def test_a_bug_is_one_line_and_code_70(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(optimize, "search", raising(ZeroDivisionError("by zero")))
    assert cli.main(["--model", "x"]) == 70
    assert capsys.readouterr().err == (
        "heretic-kl: error: internal error, please report it: ZeroDivisionError: by zero; "
        "--debug shows the traceback\n"
    )


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), StudyError("cannot be read")])
def test_debug_shows_the_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(optimize, "search", raising(error))
    assert cli.main(["--model", "x", "--debug"]) == (1 if isinstance(error, StudyError) else 70)
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "raise error" in err
    assert "--debug" not in err.splitlines()[-1] and str(error) in err.splitlines()[-1]
    monkeypatch.setenv("HERETIC_KL_DEBUG", "1")
    cli.main(["--model", "x"])
    assert "Traceback" in capsys.readouterr().err


def test_help_version_and_config(capsys: Capture) -> None:
    assert cli.main(["--help"]) == 0
    short = capsys.readouterr().out
    assert "usage: heretic-kl --model" in short and "-m, --model MODEL" in short
    assert "--edit.norm" not in short
    assert cli.main(["--help-all"]) == 0
    assert "--edit.norm {none,row" in capsys.readouterr().out
    assert cli.main(["demo", "-h"]) == 0
    assert "[heretic-kl-demo/studies]" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"heretic-kl {__version__}\n"
    assert cli.main(["config"]) == 0
    assert capsys.readouterr().out == default_configuration()
    for command in SUMMARIES:
        for flag in ("-h", "--help", "--help-all"):
            assert cli.main([command, flag]) == 0
            lines = capsys.readouterr().out.splitlines()
            assert lines[0].startswith("usage: heretic-kl") and max(map(len, lines)) <= 100


@pytest.mark.parametrize("words", [["--help"], ["score", "--help-all"], ["--version"], ["--model"]])
def test_no_heavy_library_is_imported_before_a_run(words: list[str]) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'optuna', 'rich', 'questionary', 'numpy'}"
    code = (
        f"import sys; from heretic_kl.cli.main import main; main({words})\n"
        f"print(sorted({heavy} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=with_package()
    )
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "heretic_kl", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env=with_package(),
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize(("keyboard", "screen"), [(True, True), (True, False), (False, True)])
def test_questions_need_a_terminal_at_both_ends(
    monkeypatch: pytest.MonkeyPatch, keyboard: bool, screen: bool
) -> None:
    for name, is_terminal in (("sys.stdin", keyboard), ("sys.stdout", screen)):
        stream = StringIO()
        monkeypatch.setattr(stream, "isatty", lambda response=is_terminal: response)
        monkeypatch.setattr(name, stream)
    assert at_terminal() is (keyboard and screen)
