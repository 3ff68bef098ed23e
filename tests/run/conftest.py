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


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """Harmful prompts whose responses hold one of the markers and harmless ones that do not."""
    folder = tmp_path_factory.mktemp("refine")
    save_tiny_model(folder / "model", tiny_llama())
    lines = [" ".join(WORDS[i % 12 :][: 2 + i % 5]) for i in range(48)]
    (folder / "prompts.txt").write_text("\n".join(dict.fromkeys(lines)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def markers(refusing):
    """Words that some responses hold and others do not."""
    from heretic_kl.engine import Engine
    from heretic_kl.prompts import DatasetSpec, load_prompts
    from heretic_kl.testing import load_tiny_model

    lm = load_tiny_model(refusing / "model")
    engine = Engine(lm, batch_size=8)
    prompts = tuple(load_prompts(DatasetSpec(str(refusing / "prompts.txt"))))
    texts = [lm.chat.decode(r.tokens) for r in engine.responses(prompts, 6)]
    counts = {
        word: sum(word in text.split() for text in texts)
        for word in {word for text in texts for word in text.split()}
    }
    return [min(counts, key=lambda word: (abs(counts[word] - len(texts) / 2), word))]
