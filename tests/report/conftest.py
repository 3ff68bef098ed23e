"""A finished study that tests of the report share."""

from __future__ import annotations

from pathlib import Path

import pytest
from study_samples import make_run_file, make_study


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the study `s` and what its run recorded."""
    folder = tmp_path_factory.mktemp("studies")
    make_study(folder)
    make_run_file(folder)
    return folder
