"""Where a response in llama.cpp ends; needs no llama.cpp."""

from types import SimpleNamespace

import torch

from heretic_kl.score.llama import LlamaModel


def test_a_response_ends_with_the_end_of_a_turn(monkeypatch):
    """Files of some models name the end of the text alone as end, as those of Gemma do."""
    said, turn_ends = iter([5, 2, 7, 4, 4]), 7
    model = object.__new__(LlamaModel)
    model.vocabulary_pointer = "vocabulary"
    model.library = SimpleNamespace(
        llama_vocab_is_eog=lambda vocabulary, token: (vocabulary, token) == ("vocabulary", 7)
    )
    monkeypatch.setattr(model, "_forget", lambda: None)
    monkeypatch.setattr(model, "_decode", lambda tokens, start, first: None)
    one_hot = torch.eye(9)
    monkeypatch.setattr(model, "_logits", lambda rows: one_hot[[next(said)]])
    assert model.respond([1, 2, 3], 5) == [5, 2, turn_ends]
    assert model.respond([1, 2, 3], 2) == [4, 4]
