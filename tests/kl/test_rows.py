"""What one row tells."""

import math

import pytest
import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    DivergenceReduction,
    RowStatistics,
    forward_kl,
    reference_rows,
    row_statistics,
    terms,
)
from heretic_kl.kl.terms import best_tokens

GENERATOR = torch.Generator().manual_seed(0)
REFERENCE = torch.randn(12, 50, generator=GENERATOR) * 3
CANDIDATE = REFERENCE + torch.randn(12, 50, generator=GENERATOR)
TOKENS = torch.randint(50, (12,), generator=GENERATOR)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_every_column_against_its_definition(temperature):
    found = row_statistics(REFERENCE, CANDIDATE, TOKENS, temperature=temperature)
    p = (REFERENCE.double() / temperature).softmax(-1)
    q = (CANDIDATE.double() / temperature).softmax(-1)
    every = torch.arange(12)
    best, second = p.topk(2).values.unbind(-1)
    close = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(found.values, (p * (p / q).log()).sum(-1), **close)
    torch.testing.assert_close(found.reference_probability, p[every, TOKENS], **close)
    torch.testing.assert_close(found.candidate_probability, q[every, TOKENS], **close)
    torch.testing.assert_close(found.reference_top1_probability, best, **close)
    torch.testing.assert_close(found.reference_margin, best - second, **close)
    assert torch.equal(found.top1_agreement, p.argmax(-1) == q.argmax(-1))
    assert not found.infinite.any()
    assert {c.dtype for c in found} == {torch.float64, torch.bool}


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_blocks_do_not_matter(divergence, monkeypatch):
    whole = row_statistics(REFERENCE, CANDIDATE, TOKENS, divergence=divergence)
    monkeypatch.setitem(terms.BLOCK_ELEMENTS, "cpu", 120)
    for one, other in zip(
        whole, row_statistics(REFERENCE, CANDIDATE, TOKENS, divergence=divergence), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_prepared_reference_gives_the_same_bits(divergence, dtype, monkeypatch):
    reference, candidate = REFERENCE.to(dtype), CANDIDATE.to(dtype)
    reduction = DivergenceReduction(divergence, 1.5)
    monkeypatch.setitem(terms.BLOCK_ELEMENTS, "cpu", 120)
    prepared = reduction.prepare(reference)
    assert prepared.bytes >= reference.numel() * (4 + 8)
    before = prepared.distribution.probability.clone()
    for _ in range(2):
        ours = reduction(prepared, candidate, TOKENS)
        for one, other in zip(ours, reduction(reference, candidate, TOKENS), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(prepared.distribution.probability, before)


def test_a_prepared_reference_must_fit():
    prepared = reference_rows(REFERENCE, temperature=2.0)
    with pytest.raises(ValueError, match="prepared at temperature 2.0, not 1.0"):
        row_statistics(prepared, CANDIDATE, TOKENS)
    with pytest.raises(ValueError, match=r"\(12, 50\) and \(11, 50\)"):
        row_statistics(prepared, CANDIDATE[1:], TOKENS[1:], temperature=2.0)
    with pytest.raises(MeasurementError, match="reference logits"):
        reference_rows(REFERENCE.clone().fill_(math.nan))
    none = reference_rows(REFERENCE[:0])
    assert row_statistics(none, CANDIDATE[:0], TOKENS[:0]).values.shape == (0,)


def test_identical_logits_change_nothing():
    found = row_statistics(REFERENCE, REFERENCE.clone(), TOKENS)
    assert bool((found.values == 0).all()) and bool(found.top1_agreement.all())
    assert torch.equal(found.reference_probability, found.candidate_probability)


def test_directions_differ_and_reverse_is_the_exchange():
    forward = row_statistics(REFERENCE, CANDIDATE, TOKENS)
    reverse = row_statistics(REFERENCE, CANDIDATE, TOKENS, divergence="reverse_kl")
    exchanged = row_statistics(CANDIDATE, REFERENCE, TOKENS)
    assert torch.equal(reverse.values, exchanged.values)
    assert not torch.equal(reverse.values, forward.values)
    assert torch.equal(reverse.reference_probability, forward.reference_probability)


def test_infinite_rows_are_flagged_and_leave_others_alone():
    candidate = CANDIDATE.clone()
    candidate[3, 7] = -math.inf
    found = row_statistics(REFERENCE, candidate, TOKENS)
    assert found.infinite.nonzero().flatten().tolist() == [3]
    assert found.values[3].item() == math.inf
    alone = forward_kl(reference=REFERENCE, candidate=CANDIDATE, reduction="none")
    others = torch.arange(12) != 3
    torch.testing.assert_close(found.values[others], alone[others], rtol=1e-12, atol=1e-12)


def test_a_vocabulary_of_one_and_no_rows():
    only = row_statistics(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, dtype=torch.long))
    assert only.reference_margin.tolist() == [1.0, 1.0]
    assert only.values.tolist() == [0.0, 0.0]
    none = row_statistics(torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert [tuple(c.shape) for c in none] == [(0,)] * len(RowStatistics._fields)


def test_nan_is_an_error():
    broken = CANDIDATE.clone()
    broken[5, 5] = math.nan
    with pytest.raises(MeasurementError, match="candidate logits"):
        row_statistics(REFERENCE, broken, TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(11, dtype=torch.long), r"\(12,\).*got \(11,\)"),
        (torch.full((12,), 50), r"in \[0, 50\), got 50 to 50"),
        (torch.full((12,), -1), r"got -1 to -1"),
        (torch.zeros(12), "must be integers"),
    ],
)
def test_tokens_must_fit(tokens, message):
    with pytest.raises(ValueError, match=message):
        row_statistics(REFERENCE, CANDIDATE, tokens)


def test_shapes_and_directions_must_fit():
    with pytest.raises(ValueError, match=r"\(12, 50\) and \(11, 50\)"):
        row_statistics(REFERENCE, CANDIDATE[:11], TOKENS)
    with pytest.raises(ValueError, match="rows, V"):
        row_statistics(REFERENCE[None], CANDIDATE[None], TOKENS)
    with pytest.raises(ValueError, match="divergence must be one of"):
        row_statistics(REFERENCE, CANDIDATE, TOKENS, divergence="backward")


@pytest.mark.parametrize("width", [1, 255, 256, 512, 513, 1000, 1024])
def test_the_best_token_is_the_first_of_the_largest(width):
    generator = torch.Generator().manual_seed(width)
    logits = torch.randint(0, 40, (64, width), generator=generator).float()
    logits[3], logits[5, -1], logits[7, 0] = -torch.inf, 50.0, 50.0
    logits[9, width // 2] = torch.nan
    assert torch.equal(best_tokens(logits), logits.argmax(dim=-1))
    part = logits[:, : width // 2 + 1]
    assert torch.equal(best_tokens(part), part.argmax(dim=-1))
