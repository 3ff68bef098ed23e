"""Small models in the folder where `heretic-kl score` runs."""

import pytest
from score_runs import PROMPTS

from heretic_kl.testing import save_tiny_model, tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "a", tiny_llama())
    save_tiny_model(folder / "b", tiny_llama(), seed=1)
    save_tiny_model(folder / "stranger", tiny_llama())
    file = folder / "stranger" / "tokenizer.json"
    file.write_text(file.read_text().replace('"weather"', '"climate"'))
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text(PROMPTS)
    for name in ("a", "b", "stranger"):
        (tmp_path / name).symlink_to(models / name)
    return tmp_path


@pytest.fixture
def nothing(monkeypatch):
    """No weights may be loaded."""
    from heretic_kl.score import loader

    def loaded(*words, **options):
        raise AssertionError("a model was loaded before everything was checked")

    monkeypatch.setattr(loader, "load_to_measure", loaded)
