"""Laws of the divergences, with `torch.distributions` as oracle."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    forward_kl,
    geometric_weights,
    jensen_shannon,
    reverse_kl,
    terms,
)

INF = math.inf
SEEDED = torch.Generator().manual_seed(0)
DIVERGENCES = {"forward": forward_kl, "reverse": reverse_kl, "js": jensen_shannon}
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
laws = settings(max_examples=25, deadline=None, derandomize=True)


def draw(seed: int, *shape: int, spread: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).to(dtype)


def oracle(reference: Tensor, candidate: Tensor, temperature: float = 1.0) -> Tensor:
    return kl_divergence(
        Categorical(logits=reference.double() / temperature),
        Categorical(logits=candidate.double() / temperature),
    )


@laws
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(2, 400),
    spread=st.floats(0.01, 12.0),
    noise=st.floats(1e-3, 5.0),
    temperature=st.floats(0.3, 4.0),
)
def test_float64_agrees_with_torch_distributions(seed, width, spread, noise, temperature):
    p = draw(seed, 5, width, spread=spread)
    q = p + draw(seed + 1, 5, width, spread=noise)
    found = forward_kl(reference=p, candidate=q, temperature=temperature, reduction="none")
    torch.testing.assert_close(found, oracle(p, q, temperature), rtol=1e-9, atol=1e-9)
    found = reverse_kl(reference=p, candidate=q, temperature=temperature, reduction="none")
    torch.testing.assert_close(found, oracle(q, p, temperature), rtol=1e-9, atol=1e-9)


@laws
@given(seed=st.integers(0, 2**31), width=st.integers(2, 400), noise=st.floats(1e-3, 20.0))
def test_jensen_shannon_agrees_with_its_definition_is_symmetric_and_bounded(seed, width, noise):
    p = draw(seed, 5, width)
    q = p + draw(seed + 1, 5, width, spread=noise)
    middle = ((p.softmax(-1) + q.softmax(-1)) / 2).log()
    found = jensen_shannon(reference=p, candidate=q, reduction="none")
    expected = (oracle(p, middle) + oracle(q, middle)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found, jensen_shannon(reference=q, candidate=p, reduction="none"))
    assert bool((found <= math.log(2)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_divergence
def test_never_negative_over_ten_thousand_draws(divergence, dtype):
    spread = torch.logspace(-4, 1.2, 10_000, dtype=torch.float64).unsqueeze(-1)
    p = draw(1, 10_000, 24) * spread
    noise = torch.logspace(-12, 1, 10_000, dtype=torch.float64)[
        torch.randperm(10_000, generator=SEEDED)
    ]
    q = p + draw(2, 10_000, 24) * noise.unsqueeze(-1)
    found = divergence(reference=p.to(dtype), candidate=q.to(dtype), reduction="none")
    assert found.dtype == torch.float64
    assert bool((found >= 0.0).all()) and bool(torch.isfinite(found).all())


@pytest.mark.parametrize("width", [32_000, 151_936, 262_144])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_vocabularies_agree_with_float64_of_the_same_input(width, dtype):
    p = draw(3, 2, width, dtype=dtype)
    q = (p + draw(4, 2, width, spread=0.1)).to(dtype)
    for divergence in DIVERGENCES.values():
        narrow = divergence(reference=p, candidate=q, reduction="none")
        wide = divergence(reference=p.double(), candidate=q.double(), reduction="none")
        torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(
        forward_kl(reference=p, candidate=q, reduction="none"), oracle(p, q), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("noise", [1e-9, 1e-7, 1e-5, 1e-3])
def test_nearly_identical_pairs_follow_the_second_order_expansion(noise):
    p = draw(5, 4, 5_000)
    delta = draw(6, 4, 5_000, spread=1.0)
    probability = p.softmax(-1)
    mean = (probability * delta).sum(-1)
    fisher = (probability * delta**2).sum(-1) - mean**2
    for divergence, factor in ((forward_kl, 0.5), (reverse_kl, 0.5), (jensen_shannon, 0.125)):
        found = divergence(reference=p, candidate=p + noise * delta, reduction="none")
        expected = factor * noise**2 * fisher
        tolerance = max(10 * noise, 2e-5)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0.0)


def test_float32_measures_tiny_divergences():
    p = draw(7, 4, 50_000, dtype=torch.float32)
    q = p + draw(8, 4, 50_000, spread=1e-4, dtype=torch.float32)
    found = forward_kl(reference=p, candidate=q, reduction="none")
    wide = forward_kl(reference=p.double(), candidate=q.double(), reduction="none")
    torch.testing.assert_close(found, wide, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every_divergence
def test_a_distribution_is_exactly_nought_from_itself(divergence, dtype):
    p = draw(9, 3, 1_000, spread=8.0, dtype=dtype)
    assert divergence(reference=p, candidate=p.clone(), reduction="sum").item() == 0.0


@laws
@given(seed=st.integers(0, 2**31), noise=st.floats(1e-6, 10.0))
def test_forward_is_reverse_with_arguments_exchanged(seed, noise):
    p = draw(seed, 3, 60, dtype=torch.float32)
    q = p + draw(seed + 1, 3, 60, spread=noise, dtype=torch.float32)
    assert torch.equal(
        forward_kl(reference=p, candidate=q, reduction="none"),
        reverse_kl(reference=q, candidate=p, reduction="none"),
    )


@laws
@given(seed=st.integers(0, 2**31), shift=st.floats(-50.0, 50.0), temperature=st.floats(0.5, 3.0))
def test_logits_log_probabilities_and_shifted_logits_agree(seed, shift, temperature):
    p, q = draw(seed, 4, 50), draw(seed + 1, 4, 50)
    for divergence in DIVERGENCES.values():
        whole = divergence(reference=p, candidate=q, temperature=temperature)
        shifted = divergence(reference=p + shift, candidate=q - shift, temperature=temperature)
        given_log = divergence(
            reference=p.log_softmax(-1),
            candidate=q.log_softmax(-1),
            temperature=temperature,
            inputs="log_probabilities",
        )
        torch.testing.assert_close(shifted, whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(given_log, whole, rtol=1e-9, atol=1e-12)


def test_rows_in_blocks_equal_rows_alone(monkeypatch):
    p, q = draw(10, 40, 300, dtype=torch.float32), draw(11, 40, 300, dtype=torch.float32)
    for divergence in DIVERGENCES.values():
        whole = divergence(reference=p, candidate=q, reduction="none")
        with monkeypatch.context() as patch:
            patch.setitem(terms.BLOCK_ELEMENTS, "cpu", 700)
            chunked = divergence(reference=p, candidate=q, reduction="none")
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)


def test_infinities():
    p = torch.tensor([[1.0, 2.0, -INF], [1.0, 2.0, -INF], [1.0, 2.0, 0.0], [1.0, -INF, -INF]])
    q = torch.tensor([[2.0, 1.0, -INF], [2.0, 1.0, 0.0], [2.0, 1.0, -INF], [-INF, 1.0, 2.0]])
    forward = forward_kl(reference=p, candidate=q, reduction="none")
    both = oracle(p[:1, :2], q[:1, :2])[0]
    torch.testing.assert_close(forward[0], both, rtol=1e-6, atol=0.0)
    first = p[1].double().softmax(-1)
    second = q[1].double().log_softmax(-1)
    reference_only = (first * (first.log() - second)).nan_to_num(nan=0.0).sum()
    torch.testing.assert_close(forward[1], reference_only, rtol=1e-6, atol=0.0)
    assert forward[2].item() == INF and forward[3].item() == INF
    reverse = reverse_kl(reference=p, candidate=q, reduction="none")
    assert torch.isinf(reverse).tolist() == [False, True, False, True]
    shannon = jensen_shannon(reference=p, candidate=q, reduction="none")
    assert bool(torch.isfinite(shannon).all())
    assert shannon[3].item() == pytest.approx(math.log(2), abs=1e-7)


def test_a_token_excluded_in_the_candidate_counts_even_if_the_reference_underflows_there():
    p = torch.tensor([[0.0, -1000.0]])
    q = torch.tensor([[0.0, -INF]])
    assert forward_kl(reference=p, candidate=q).item() == INF


def test_vanishing_tokens_stay_finite():
    p, q = torch.tensor([[0.0, -1000.0]]), torch.tensor([[0.0, -3e38]])
    assert forward_kl(reference=p, candidate=q).item() == 0.0
    assert reverse_kl(reference=p, candidate=q).item() == 0.0


@pytest.mark.parametrize("far", [45.0, 60.0, 1e4, 1e9, 3e38, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_only_the_candidate_has_contributes_its_probability(far, dtype):
    p = torch.tensor([[0.0, 0.0, -far]], dtype=dtype)
    q = torch.tensor([[0.0, 0.0, 0.0]], dtype=dtype)
    found = forward_kl(reference=p, candidate=q).item()
    assert found == pytest.approx(math.log(1.5), rel=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("gap", [0.01, 0.0157, 0.3, 1.0, 3.0, 17.0, 49.0, 51.0, 90.0])
def test_no_seam_between_the_forms(gap):
    for sign in (1.0, -1.0):
        q = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
        p = q + torch.tensor([[0.0, sign * gap]], dtype=torch.float64)
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        expected = (log_p.exp() * (log_p - log_q)).sum().item()
        found = forward_kl(reference=p, candidate=q).item()
        assert found == pytest.approx(expected, rel=1e-9)
        narrow = forward_kl(reference=p.float(), candidate=q.float()).item()
        assert narrow == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("whose", ["reference", "candidate"])
@every_divergence
def test_nan_names_the_side_and_the_row(divergence, whose, bad):
    tensors = {"reference": draw(1, 4, 6), "candidate": draw(2, 4, 6)}
    tensors[whose][2, 3] = bad
    with pytest.raises(MeasurementError, match=f"{whose} logits.*1 of 4 rows.*row 2"):
        divergence(**tensors)


def test_a_row_without_any_token_is_an_error():
    p = torch.zeros(2, 4)
    with pytest.raises(MeasurementError, match="candidate"):
        forward_kl(reference=p, candidate=p.clone().fill_(-INF))


@every_divergence
def test_masked_content_is_never_read(divergence):
    p, q = draw(12, 3, 4, 9), draw(13, 3, 4, 9)
    mask = torch.rand(3, 4, generator=SEEDED) < 0.6
    mask[0, 0], mask[0, 1] = True, False
    clean = divergence(reference=p, candidate=q, mask=mask)
    p[~mask], q[~mask] = math.nan, INF
    assert torch.equal(divergence(reference=p, candidate=q, mask=mask), clean)
    rows = divergence(reference=p, candidate=q, mask=mask, reduction="none")
    assert rows.shape == (3, 4) and bool((rows[~mask] == 0.0).all())
    torch.testing.assert_close(rows[mask].mean(), clean)


def test_reductions_and_weights():
    p, q = draw(14, 3, 4, 9), draw(15, 3, 4, 9)
    rows = forward_kl(reference=p, candidate=q, reduction="none")
    weights = geometric_weights(4, 0.5)
    assert weights.tolist() == [1.0, 0.5, 0.25, 0.125]
    assert geometric_weights(3, 1.0).tolist() == [1.0, 1.0, 1.0]
    total = forward_kl(reference=p, candidate=q, weights=weights, reduction="sum")
    torch.testing.assert_close(total, (rows * weights).sum())
    mean = forward_kl(reference=p, candidate=q, weights=weights)
    torch.testing.assert_close(mean, (rows * weights).sum() / (3 * weights.sum()))
    torch.testing.assert_close(forward_kl(reference=p, candidate=q), rows.mean())
    single = forward_kl(reference=p[0, 0], candidate=q[0, 0], reduction="none")
    torch.testing.assert_close(single, rows[0, 0])
    full = torch.rand(3, 4, generator=SEEDED)
    scored = forward_kl(reference=p, candidate=q, weights=full, reduction="none")
    torch.testing.assert_close(scored, rows * full.double())
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert forward_kl(reference=p, candidate=q, mask=nothing, reduction="sum").item() == 0.0
    with pytest.raises(MeasurementError, match="nothing left to score"):
        forward_kl(reference=p, candidate=q, mask=nothing)


def test_no_gradient_is_recorded():
    p = draw(1, 2, 5).requires_grad_()
    assert not forward_kl(reference=p, candidate=p).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidate": torch.zeros(2, 6)}, r"\(2, 5\) and \(2, 6\)"),
        ({"candidate": torch.zeros(2, 5, dtype=torch.int64)}, "floating point"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"\(2,\), got \(3,\)"),
        ({"weights": torch.ones(3)}, r"\(2,\).*got \(3,\)"),
        ({"weights": torch.tensor([1.0, -1.0])}, "not negative"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"reduction": "mean"}, "reduction must be"),
        ({"inputs": "probabilities"}, "inputs must be"),
    ],
)
def test_wrong_arguments_say_what_was_given(change, message):
    arguments = {"reference": torch.zeros(2, 5), "candidate": torch.zeros(2, 5), **change}
    with pytest.raises(ValueError, match=message):
        forward_kl(**arguments)


def test_scalars_are_no_vocabulary_and_weights_need_sense():
    with pytest.raises(ValueError, match="vocabulary"):
        forward_kl(reference=torch.zeros(()), candidate=torch.zeros(()))
    with pytest.raises(ValueError, match="positions must be at least 1, got 0"):
        geometric_weights(0, 1.0)
    with pytest.raises(ValueError, match="ratio"):
        geometric_weights(3, 0.0)


def test_logits_passed_as_log_probabilities_are_noticed():
    p = draw(1, 2, 5)
    with pytest.raises(MeasurementError, match="do not sum to one"):
        forward_kl(reference=p, candidate=p, inputs="log_probabilities")
