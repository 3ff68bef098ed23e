"""From hidden states to logits."""

import dataclasses

import pytest
import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import Head, KLTable, Reference, ReferenceIdentity, row_statistics

GENERATOR = torch.Generator().manual_seed(1)
WEIGHT = torch.randn(40, 8, generator=GENERATOR)
BIAS = torch.randn(40, generator=GENERATOR)
HIDDEN = torch.randn(11, 8, generator=GENERATOR)
EDITED = HIDDEN + 0.2 * torch.randn(11, 8, generator=GENERATOR)
TOKENS = torch.randint(37, (11,), generator=GENERATOR)
FULL = Head(WEIGHT, BIAS, scale=0.25, softcap=3.0, vocabulary_size=37)


def measured(head: Head, candidate: torch.Tensor, max_elements: int = 10_000) -> KLTable:
    identity = ReferenceIdentity("", head.vocabulary, None, {})
    reference = Reference.from_hidden(TOKENS[:, None], torch.ones(11, 1).bool(), HIDDEN, identity)
    return reference.measure(candidate, head=head, max_elements=max_elements)


def test_logits_respect_bias_scale_softcap_and_padding():
    expected = torch.tanh((HIDDEN @ WEIGHT.T + BIAS) * 0.25 / 3.0)[:, :37] * 3.0
    torch.testing.assert_close(FULL.logits(HIDDEN), expected)
    assert FULL.vocabulary == 37
    torch.testing.assert_close(Head(WEIGHT).logits(HIDDEN), HIDDEN @ WEIGHT.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_heads_multiply_in_their_dtype_and_return_float32(dtype):
    head = Head(WEIGHT.to(dtype))
    expected = (HIDDEN.to(dtype) @ WEIGHT.to(dtype).T).float()
    assert head.logits(HIDDEN).dtype == torch.float32
    assert torch.equal(head.logits(HIDDEN), expected)
    assert Head(WEIGHT.double()).logits(HIDDEN).dtype == torch.float64


@pytest.mark.parametrize("max_elements", [1, 37, 100, 10_000])
def test_chunks_equal_the_whole(max_elements):
    found = measured(FULL, EDITED, max_elements).columns()
    whole = row_statistics(FULL.logits(HIDDEN), FULL.logits(EDITED), TOKENS)._asdict()
    for name, column in whole.items():
        torch.testing.assert_close(found[name][:, 0], column.to(found[name]), rtol=1e-4, atol=1e-7)


def test_never_more_logits_than_allowed(monkeypatch):
    seen = []
    plain = Head.logits

    def watched(self, hidden):
        seen.append(plain(self, hidden))
        return seen[-1]

    monkeypatch.setattr(Head, "logits", watched)
    measured(FULL, EDITED, 3 * 37)
    assert max(logits.numel() for logits in seen) == 3 * 37
    assert sum(len(logits) for logits in seen) == 2 * 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_hidden_states_give_exactly_nought(dtype):
    head = dataclasses.replace(FULL, weight=WEIGHT.to(dtype), bias=BIAS.to(dtype))
    unaligned = torch.empty(11 * 8 + 1)[1:].view(11, 8).copy_(HIDDEN)
    for max_elements in (37, 150, 10_000):
        found = measured(head, unaligned, max_elements)
        assert found.values.sum().item() == 0.0
        assert torch.equal(found.reference_probability, found.candidate_probability)


def test_nan_hidden_states_are_an_error():
    broken = EDITED.clone()
    broken[4, 2] = float("nan")
    with pytest.raises(MeasurementError, match="candidate logits"):
        measured(FULL, broken)


def test_fingerprint_tells_heads_apart():
    one_row = WEIGHT.clone()
    one_row[20] += 0.01
    padded = WEIGHT.clone()
    padded[38] += 1.0
    others = [
        dataclasses.replace(FULL, scale=0.5),
        dataclasses.replace(FULL, softcap=None),
        dataclasses.replace(FULL, bias=None),
        dataclasses.replace(FULL, bias=BIAS + 0.01),
        dataclasses.replace(FULL, vocabulary_size=36),
        dataclasses.replace(FULL, weight=one_row),
        dataclasses.replace(FULL, weight=WEIGHT.bfloat16()),
    ]
    prints = [head.fingerprint() for head in (FULL, *others)]
    assert len(set(prints)) == len(prints)
    whole = dataclasses.replace(FULL, scale=2, softcap=30)
    assert whole.fingerprint() == dataclasses.replace(FULL, scale=2.0, softcap=30.0).fingerprint()
    assert dataclasses.replace(FULL, weight=WEIGHT.clone()).fingerprint() == prints[0]
    assert dataclasses.replace(FULL, weight=padded).fingerprint() == prints[0]
    assert dataclasses.replace(FULL, weight=WEIGHT.T.contiguous().T).fingerprint() == prints[0]


@pytest.mark.parametrize("row", [0, 1, 4_999])
def test_fingerprint_touches_every_row_of_a_large_head(row):
    weight = torch.zeros(5_000, 64)
    before = Head(weight).fingerprint()
    weight[row] = 1.0
    assert Head(weight).fingerprint() != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(40)}, r"weight must be \(V, D\)"),
        ({"bias": torch.zeros(39)}, r"bias must be \(40,\).*got \(39,\)"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"vocabulary_size": 41}, r"in \[1, 40\], got 41"),
    ],
)
def test_parts_must_fit(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(FULL, **change)


def test_hidden_states_must_fit():
    with pytest.raises(ValueError, match=r"\(rows, 8\).*got \(2, 9\)"):
        FULL.logits(torch.zeros(2, 9))
    with pytest.raises(ValueError, match=r"\(11, D\), got \(10, 8\)"):
        measured(FULL, EDITED[:10])
