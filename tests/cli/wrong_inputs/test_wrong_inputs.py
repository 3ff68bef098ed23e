"""Every wrong input of the tables gets its line and its exit code, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from heretic_kl.cli import main as cli
from wrong_inputs import child
from wrong_inputs.page import CASES, page

ROOT = Path(__file__).parents[3]
EXIT_CODES = {1, 2, 3}
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths, pipes and links")


def cases(some):
    return [pytest.param(case, id=case.what.replace(" ", "-")) for case in some]


def everything(folder):
    """Paths below a folder, with what would change if one were written to."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if not path.is_dir()}


@pytest.fixture
def place(tmp_path, monkeypatch, workplace):
    """An empty folder with a tiny model, and no settings in the environment."""
    for name in [name for name in os.environ if name.startswith("HERETIC_KL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    shutil.copytree(workplace / "model", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", cases(CASES))
def test_a_wrong_input_gets_its_line(case, place, capsys, monkeypatch, request):
    if any("studies" in word for word in case.words):
        request.getfixturevalue("searched")
        shutil.copytree(request.getfixturevalue("workplace") / "studies", place / "studies")
        capsys.readouterr()
    case.prepare(place)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    before, started = everything(place), time.monotonic()
    code = cli.main(case.words)
    seconds = time.monotonic() - started
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("heretic-kl: error: ")]
    assert code == case.code and code in EXIT_CODES, err
    assert len(errors) == 1 and case.matches(errors[0]), err
    assert err.splitlines()[-1] == errors[0] and "Traceback" not in out + err
    assert all(character.isprintable() or character == "\n" for character in err)
    assert everything(place) == before
    assert seconds < case.seconds


def test_a_wrong_setting_shows_before_torch_is_imported(tmp_path):
    environment = {name: v for name, v in os.environ.items() if not name.startswith("HERETIC_KL_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "cli")])
    done = subprocess.run(
        [sys.executable, "-m", "wrong_inputs.child", str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(child.CASES)
    for case, (code, err, torch) in zip(child.CASES, results, strict=True):
        assert code == 2 and not torch, case.what
        assert err.count("\n") == 1 and case.matches(err.rstrip("\n")), err


@pytest.mark.parametrize("words", [["--kl-tokens", "0"], ["--model", "model", "--storage", "x"]])
def test_a_process_of_its_own_says_the_same(words, place):
    done = subprocess.run(
        [sys.executable, "-m", "heretic_kl", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_the_tables_are_large_and_their_rows_differ():
    assert len(CASES) >= 60
    assert len({case.what for case in CASES}) == len(CASES)


def test_the_page_is_up_to_date():
    text = (ROOT / "docs" / "wrong-inputs.md").read_text(encoding="utf-8")
    assert text == page(), "run `make wrong-inputs`"
