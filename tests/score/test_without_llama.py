"""Where a response in llama.cpp ends, and what its floor holds; needs no llama.cpp."""

from types import SimpleNamespace

import pytest
import torch

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.kl import DivergenceReduction
from heretic_kl.score.llama import LlamaModel
from heretic_kl.score.llama.reference import LlamaReference


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


def test_a_floor_holds_a_block_of_logits_at_a_time(monkeypatch):
    torch.manual_seed(0)
    sequences = [ForcedSequence((1,), tuple(range(count))) for count in (9, 5)]
    logits = {sequence: torch.randn(len(sequence.response), 12) for sequence in sequences}
    noise = {sequence: 0.1 * torch.randn(len(sequence.response), 12) for sequence in sequences}

    class Model:
        block_rows = 4

        def blocks(self, sequence):
            rounding = noise[sequence] if self.block_rows < 4 else 0.0
            yield from (logits[sequence] + rounding).split(self.block_rows)

        def beside(self):
            return Model()

        def close(self):
            pass

    def reduction(whole, parts, tokens):
        shapes.append((len(whole), len(parts), tokens.tolist()))
        return real(whole, parts, tokens)

    shapes, real = [], DivergenceReduction()
    reference = object.__new__(LlamaReference)
    monkeypatch.setattr(reference, "_opened", lambda context: Model(), raising=False)
    floor = reference.noise_floor(sequences, reduction)
    apart = [
        real(logits[s], logits[s] + noise[s], torch.tensor(s.response)).values.mean()
        for s in sequences
    ]
    assert floor == pytest.approx(float(torch.stack(apart).mean()), rel=1e-9)
    lengths = [4, 4, 1, 4, 1]
    assert [shape[:2] for shape in shapes] == [(length, length) for length in lengths]
    assert shapes[2][2] == [8] and shapes[3][2] == [0, 1, 2, 3]
