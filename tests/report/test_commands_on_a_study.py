"""Commands on a finished study find it, and list what was only predicted of its trials."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from study_samples import SCREENED

from heretic_kl.cli.main import main

pytest.importorskip("vl_convert")


@pytest.mark.parametrize("words", [["report"], ["trials"], ["show", "--trial", "0"]])
def test_after_the_demo_its_study_needs_no_name(
    studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    shutil.copytree(studies, tmp_path / "heretic-kl-demo" / "studies")
    assert main(words) == 0
    (tmp_path / "studies").mkdir()
    assert main(words) == 1


def test_a_screened_trial_is_listed_with_its_prediction_and_cannot_be_picked(
    studies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trials", "--all", "--study-dir", str(studies)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  screened  " in line]
    assert len(lines) == 1 and "refusals 34% predicted  KL " in lines[0]
    assert main(["show", "--study-dir", str(studies), "--trial", str(SCREENED)]) == 3
    assert f"'{SCREENED}' (its state is screened); there are 0, " in capsys.readouterr().err


def test_a_dash_writes_the_page_to_stdout_and_makes_no_file(
    studies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in studies.iterdir()}
    assert main(["report", str(studies), "-o", "-"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")
    assert not list(tmp_path.iterdir()) and {path.name for path in studies.iterdir()} == before
    for flag in ("--json", "--open"):
        assert main(["report", str(studies), "-o", "-", flag]) == 2
        assert f"leave out {flag} or name a file" in str(capsys.readouterr())
