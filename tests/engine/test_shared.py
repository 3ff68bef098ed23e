"""Results of the unedited model between processes: the first one counts, no rule gets another's."""

import errno
import os

import pytest
import torch
from safetensors.torch import save

from heretic_kl.engine import Engine, Response, SharedResults
from heretic_kl.errors import StudyError
from heretic_kl.prompts import Prompt
from heretic_kl.scoring import RefusalRule
from heretic_kl.search import ReferenceStore, open_storage
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama

PROMPTS = (Prompt("hello"),)


def responses(shared, tokens, rules=(), meanwhile=lambda: None):
    """What a process takes as the response, and whether it computed it."""
    computed = []

    def compute():
        meanwhile()
        computed.append(Response(list(tokens)))
        return computed

    (response,) = shared.responses(PROMPTS, [[1, 2]], 4, rules, None, 100, compute)
    return response.tokens, bool(computed)


@pytest.mark.parametrize("place", ["folder", "folder without links", "storage"])
def test_of_two_that_compute_at_once_both_use_what_was_there_first(tmp_path, monkeypatch, place):
    def refuse(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    if place == "folder without links":
        monkeypatch.setattr(os, "link", refuse)
    url = f"sqlite:///{tmp_path / 'x.db'}" if place == "storage" else None
    with open_storage(url, tmp_path, "s") as storage:
        there = storage if url else None
        folders = ("a", "b") if url else ("a", "a")
        one, two = (SharedResults(ReferenceStore(tmp_path / f, "s", there)) for f in folders)
        ours = responses(one, [5, 6], meanwhile=lambda: responses(two, [7, 8]))
        assert ours == ([7, 8], True)
        for shared in (one, two):
            assert responses(shared, [9]) == ([7, 8], False)


class Impatient(RefusalRule):
    """Cuts responses elsewhere, under an inherited fingerprint."""

    def decided(self, text):
        return True


class Odd(RefusalRule):
    fingerprint = "no method"


def test_a_rule_gets_no_responses_that_another_class_has_cut(tmp_path):
    shared = SharedResults(ReferenceStore(tmp_path, "s"))
    assert responses(shared, [5, 6], [RefusalRule()]) == ([5, 6], True)
    assert responses(shared, [9], [RefusalRule()]) == ([5, 6], False)
    assert responses(shared, [7], [Impatient()]) == ([7], True)
    for _ in range(2):
        assert responses(shared, [8], [Odd()]) == ([8], True)


def test_a_mean_over_one_prompt_is_that_prompts_residual(tmp_path):
    lm = load_tiny_model(save_tiny_model(tmp_path / "model", tiny_llama()))
    shared = SharedResults(ReferenceStore(tmp_path, "s"), kept_of=frozenset())
    engine = Engine(lm, 2, shared=shared)
    for prompts, stored in ((PROMPTS, 0), ((*PROMPTS, Prompt("how do I")), 1)):
        engine.residual_mean(prompts, 1.0)
        assert len([*tmp_path.glob("s.original/reference-*")]) == stored


@pytest.mark.parametrize(
    "of", [torch.tensor(2**62), torch.zeros(32, dtype=torch.int64), torch.zeros(31).byte()]
)
def test_a_made_up_hash_is_no_hash(tmp_path, of):
    """Of one number Python would make that many bytes."""
    store, key = ReferenceStore(tmp_path, "s"), "0" * 64
    store.save(key, {}, {"values": torch.zeros(2)})
    digest = store._artifacts.put(save({"values": torch.zeros(2), "of": of}))
    store._artifacts.write(f"reference-{key}.json", f'{{"sha256": "{digest}"}}'.encode())
    with pytest.raises(StudyError, match="32 bytes are expected"):
        store.load(key)
