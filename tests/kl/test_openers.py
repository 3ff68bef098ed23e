"""The split of the KL at the first token: exact, never negative, zero where nothing changed."""

import pytest
import torch

from heretic_kl.kl import (
    DivergenceReduction,
    KLTable,
    OpenerReduction,
    forward_kl,
    split_at_opening,
)

OPENERS = (3, 7, 11)
PROMPTS, POSITIONS, VOCABULARY = 5, 4, 23


def split(reference, candidate, temperature=1.0, openers=OPENERS):
    """The whole and its parts, of logits (P * N, V)."""
    tokens = torch.zeros(len(reference), dtype=torch.int64)
    prompt = torch.arange(PROMPTS).repeat_interleave(POSITIONS)
    position = torch.arange(POSITIONS).repeat(PROMPTS)
    rows = DivergenceReduction("forward_kl", temperature)(reference, candidate, tokens)
    table = KLTable.from_rows(rows, prompt, position, PROMPTS, POSITIONS, temperature=temperature)
    masses = OpenerReduction(openers, temperature)(reference, candidate, tokens)
    return table, split_at_opening(table, masses, prompt, position)


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(2, PROMPTS * POSITIONS, VOCABULARY) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_parts_add_to_the_whole_and_are_never_negative(logits, temperature):
    table, parts = split(*logits, temperature)
    total = parts.behaviour.values + parts.remainder.values
    assert torch.allclose(total, table.values, rtol=1e-12, atol=1e-12)
    assert (parts.behaviour.values >= 0).all() and (parts.remainder.values >= 0).all()
    assert (parts.behaviour.values[:, 1:] == 0).all() and (parts.behaviour.values[:, 0] > 0).all()


def test_the_behaviour_is_the_divergence_of_two_cells(logits):
    _, parts = split(*logits)
    first = logits[:, ::POSITIONS].double().softmax(dim=-1)
    inside = first[..., list(OPENERS)].sum(dim=-1)
    cells = torch.stack([inside, 1 - inside], dim=-1).log()
    expected = forward_kl(reference=cells[0], candidate=cells[1], reduction="none")
    assert torch.allclose(parts.behaviour.values[:, 0], expected, rtol=1e-5)


def test_mass_that_moves_between_the_cells_alone_is_all_behaviour(logits):
    reference = logits[0]
    candidate = reference.clone()
    candidate[::POSITIONS, list(OPENERS)] -= 4  # less of every opener, in proportion
    table, parts = split(reference, candidate)
    assert torch.allclose(parts.behaviour.values, table.values, atol=1e-6)
    assert parts.remainder.values.abs().max() < 1e-6


def test_a_change_within_the_cells_is_all_remainder(logits):
    reference = logits[0]
    candidate = reference.clone()
    others = [token for token in range(VOCABULARY) if token not in OPENERS]
    candidate[:, others] = reference[:, others[::-1]]
    table, parts = split(reference, candidate)
    assert parts.behaviour.values.abs().max() < 1e-6
    assert torch.allclose(parts.remainder.values, table.values, atol=1e-6)


def test_a_candidate_without_the_openers_is_infinitely_far(logits):
    candidate = logits[0].clone()
    candidate[0, list(OPENERS)] = float("-inf")
    table, parts = split(logits[0], candidate)
    assert table.infinite[0, 0] and parts.remainder.values[0, 0].isinf()
    assert parts.remainder.values[1:].isfinite().all()


def test_only_the_forward_divergence_is_split(logits):
    table, _ = split(*logits)
    reverse = KLTable(**{**table.columns(), "divergence": "reverse_kl"})
    with pytest.raises(ValueError, match="only forward_kl is split, got reverse_kl"):
        split_at_opening(reverse, None, None, None)
