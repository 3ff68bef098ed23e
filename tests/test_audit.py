"""`make audit` looks for known vulnerabilities, or says in one line why it does not."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def audit(folder, **programs):
    """(exit code, output) of `make audit` in an environment of these programs: name -> a script."""
    (folder / "bin").mkdir()
    for name, script in programs.items():
        program = folder / "bin" / name.replace("_", "-")
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    installed = folder / ".installed"
    installed.touch()
    os.utime(installed, (2**33, 2**33))  # newer than what it is made from
    words = ["make", "--no-print-directory", "audit", f"VENV={folder}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout.strip()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_audit_reports_or_is_skipped_in_one_line(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
    code, out = audit(tmp_path / "a", python="exit 0")
    assert code == 0 and out.startswith("audit skipped: no pip-audit") and "\n" not in out
    code, out = audit(tmp_path / "b", python="exit 1", pip_audit="echo asked")
    assert code == 0 and out.endswith("/pip/24.0/json) cannot be reached") and "\n" not in out
    assert audit(tmp_path / "c", python="exit 0", pip_audit="echo none") == (0, "none")
    code, out = audit(tmp_path / "d", python="exit 0", pip_audit="echo one; exit 1")
    assert code != 0 and out == "one"
