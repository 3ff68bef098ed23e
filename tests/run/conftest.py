"""A tiny model with prompt files."""

import pytest
from sessions import WORDS

from heretic_kl.testing import save_tiny_model, tiny_llama


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A model and prompt files; the tiny model refuses nothing, so an odd word is the marker."""
    folder = tmp_path_factory.mktemp("run")
    save_tiny_model(folder / "model", tiny_llama())
    for index, name in enumerate(("a", "b")):
        lines = [" ".join(WORDS[(i + index) % 9 :][: 3 + i % 5]) for i in range(12)]
        (folder / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder
