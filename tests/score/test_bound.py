"""The lower bound from a candidate's likeliest tokens, against the whole divergence."""

import pytest
import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    KLTable,
    Reference,
    ReferenceIdentity,
    compare_paired,
    forward_kl,
    row_statistics,
)
from heretic_kl.score.served.bound import REST_ROUNDING, TopBlock, lower_bound

P, N, V = 5, 4, 40


def random_logits(seed, spread=2.0):
    return spread * torch.randn(P * N, V, generator=torch.Generator().manual_seed(seed))


def reference_of(logits):
    tokens = torch.randint(V, (P, N), generator=torch.Generator().manual_seed(9))
    mask = torch.ones(P, N, dtype=torch.bool)
    return Reference.from_hidden(tokens, mask, logits, ReferenceIdentity("", V))


class Identity:
    """A head that takes hidden states for logits: nothing is rounded."""

    vocabulary = V

    def logits(self, hidden):
        return hidden


def known(logits, tokens, count):
    """The `count` likeliest tokens, and the response's own in the last place."""
    log_q = logits.double().log_softmax(-1)
    top = log_q.topk(count).indices
    place = tokens.flatten()[:, None]
    own = torch.where((top == place).any(-1, keepdim=True), -1, place)
    ids = torch.cat([top, own], dim=1)
    values = log_q.gather(-1, ids.clamp_min(0)).float().double()  # as a server sends them
    return ids, values.masked_fill(ids < 0, 0.0)


def bound(reference, logits, count):
    ids, values = known(logits, reference.tokens, count)
    rows = torch.arange(len(ids))
    return lower_bound(
        reference, [TopBlock(part, ids[part], values[part]) for part in rows.split(3)], Identity()
    )


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_it_is_below_the_divergence_and_rises_to_it(seed, spread):
    p, q = random_logits(seed, spread), random_logits(seed + 100, spread)
    reference = reference_of(p)
    exact = forward_kl(reference=p, candidate=q, reduction="none").reshape(P, N)
    before = torch.zeros(P, N, dtype=torch.float64)
    for count in (1, 3, 10, 30, V):
        values = bound(reference, q, count).table.values
        assert (values <= exact + 1e-6).all()
        assert (values >= before - 2 * REST_ROUNDING).all()
        before = values
    assert torch.allclose(before, exact, rtol=1e-5, atol=3 * REST_ROUNDING)


def test_it_is_the_divergence_of_merged_cells():
    p, q = random_logits(1), random_logits(2)
    reference = reference_of(p)
    ids, values = known(q, reference.tokens, 5)
    measured = bound(reference, q, 5)
    log_p = p.double().log_softmax(-1)
    for row, (tokens, log_q) in enumerate(zip(ids, values, strict=True)):
        inside = tokens >= 0
        cells_q = torch.cat([log_q[inside].exp(), 1 - log_q[inside].exp().sum().reshape(1)])
        mine = log_p[row, tokens[inside]].exp()
        cells_p = torch.cat([mine, 1 - mine.sum().reshape(1)])
        plain = torch.distributions.kl_divergence(
            torch.distributions.Categorical(cells_p), torch.distributions.Categorical(cells_q)
        )
        place = divmod(row, N)
        assert measured.table.values[place] == pytest.approx(float(plain), abs=1e-5)
        assert measured.candidate_rest[place] == pytest.approx(float(cells_q[-1]), abs=1e-12)
        assert measured.reference_rest[place] == pytest.approx(float(cells_p[-1]), abs=1e-6)


def test_what_is_known_of_a_token_is_exact():
    p, q = random_logits(3), random_logits(4)
    reference = reference_of(p)
    whole = row_statistics(p, q, reference.row_tokens)
    table = bound(reference, q, 2).table
    for name in ("reference_probability", "candidate_probability", "reference_margin"):
        assert torch.allclose(getattr(table, name).flatten(), getattr(whole, name), atol=1e-6)
    assert torch.equal(table.top1_agreement.flatten(), whole.top1_agreement)
    assert table.lower_bound


def test_the_same_model_is_at_zero():
    logits = random_logits(5)
    assert bound(reference_of(logits), logits, 3).table.values.max() < 1e-6


def test_a_token_that_only_the_candidate_excludes_is_infinite():
    p = random_logits(6)
    reference = reference_of(p)
    ids, values = known(random_logits(7), reference.tokens, 3)
    values[4, 0] = -torch.inf
    rows = torch.arange(P * N)
    table = lower_bound(reference, [TopBlock(rows, ids, values)], Identity()).table
    assert table.infinite.sum() == 1 and table.infinite[1, 0]


def test_what_is_no_distribution_is_refused():
    reference = reference_of(random_logits(8))
    ids, values = known(random_logits(9), reference.tokens, 3)
    rows = torch.arange(P * N)
    for wrong in (values + 3.0, values * torch.nan):
        with pytest.raises(MeasurementError, match="add to"):
            lower_bound(reference, [TopBlock(rows, ids, wrong)], Identity())
    with pytest.raises(ValueError, match="1 of 20 rows are missing"):
        lower_bound(reference, [TopBlock(rows[1:], ids[1:], values[1:])], Identity())


def test_it_is_never_paired_and_stays_what_it_is(tmp_path):
    p, q = random_logits(10), random_logits(11)
    table = bound(reference_of(p), q, 3).table
    table.save(tmp_path / "t.safetensors")
    assert KLTable.load(tmp_path / "t.safetensors").lower_bound
    assert table.select_prompts(torch.tensor([0, 2])).lower_bound
    for other in (table, KLTable.load(tmp_path / "t.safetensors")):
        with pytest.raises(MeasurementError, match="a lower bound cannot be paired"):
            compare_paired(table, other)
