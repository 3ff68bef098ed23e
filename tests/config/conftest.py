"""Every test of settings stands in an empty folder, without variables of the program."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("HERETIC_KL_")]:
        monkeypatch.delenv(name)
    return tmp_path
