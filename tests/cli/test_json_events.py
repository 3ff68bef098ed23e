"""Every command's `--json` keeps to the schema, and says what it wrote and where."""

import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from heretic_kl.cli.command import SUMMARIES

WORDS = {
    "optimize": ["--study-name", "mine"],
    "demo": ["--trials", "1", "--test-trials", "0", "--study-dir", "demo-studies"]
    + ["--pick", "knee"],
    "trials": ["mine"],
    "show": ["mine", "--trial", "1"],
    "save": ["mine", "--trial", "1", "--save", "json-model", "--overwrite"],
    "upload": ["json-model", "--repo", "json"],
    "report": ["mine", "-o", "json.html"],
    "reproduce": ["json-model", "--model", "model"],
    "evaluate": ["--candidate", "json-model"],
    "worker": ["mine"],
    "slurm": ["--workers", "2", "--folder", "json-jobs"],
    "bench": ["mine", "--trial", "1", "--task", "cakes", "--tasks-folder", "tasks"],
    "score": ["--reference", "model", "--candidate", "model", "--prompts", "a.txt"],
    "inspect": ["model"],
    "scorer": ["test", "refusals"],
    "config": [],
    "events": [],
}
"""Command -> arguments; `storage` serves until it is interrupted, and has a test of its own."""
EVENTS = {
    "optimize": {"model_loaded", "study_opened", "front_shown"},
    "demo": {"trial_finished", "trial_picked", "model_saved"},
    "trials": {"trial_shown", "front_shown"},
    "show": {"trial_shown"},
    "save": {"model_saved"},
    "upload": {"model_uploaded"},
    "worker": {"study_opened"},
}
"""Command -> events that say what came of it; all others give a result."""
EXTRAS = {"bench": "lm_eval", "report": "vl_convert"}
"""Command -> what it needs beyond the package."""


@pytest.mark.parametrize("command", list(WORDS))
def test_lines_keep_to_the_schema(command, searched, events, there, hub, monkeypatch):
    if command in EXTRAS and find_spec(EXTRAS[command]) is None:
        pytest.skip(f"{EXTRAS[command]} is not installed")
    monkeypatch.setattr("heretic_kl.demo.ensure_demo_model", lambda **_: there / "model")
    if command in ("upload", "reproduce", "evaluate") and not (there / "json-model").exists():
        assert events("save", *WORDS["save"])[0] == 0
    if command == "bench":
        shutil.copytree(Path(__file__).parent / "tasks", there / "tasks", dirs_exist_ok=True)
    code, lines = events(*([] if command == "optimize" else [command]), *WORDS[command])
    assert code == 0, lines[-2:]
    names = {line["event"] for line in lines}
    assert names >= EVENTS.get(command, {"result"}), names
    assert "failed" not in names
    for line in lines:
        if line["event"] == "result":
            assert line["command"] == command and line["content"]


def test_results_say_where_files_are(searched, events, there):
    for words, name in (
        (["slurm", *WORDS["slurm"]], "script"),
        (["scorer", "new", "json_scorer.py"], "file"),
    ):
        (content,) = [e["content"] for e in events(*words)[1] if e["event"] == "result"]
        assert (there / content[name]).is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_served_storage_says_its_address_and_its_end(there, check_lines):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = ["storage", "serve", "--storage", "sqlite:///json.db", "--port", port, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "heretic_kl", *words],
        cwd=there,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    lines.append(process.communicate(timeout=60)[0])
    told = check_lines("".join(lines))
    results = [line["content"] for line in told if line["event"] == "result"]
    assert results == [{"storage": "sqlite:///json.db", "address": f"grpc://127.0.0.1:{port}"}]
    assert told[-1]["event"] == "ended" and told[-1]["exit_code"] == process.returncode == 143


def test_errors_are_events_too(events):
    code, lines = events("no-such-command")
    assert code == 2 and lines[0]["event"] == "failed"


def test_no_command_is_left_out():
    assert {*WORDS, "storage"} == {*SUMMARIES}
