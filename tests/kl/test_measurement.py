"""Means with errors."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    METRIC_VERSION,
    KLSummary,
    KLTable,
    compare_paired,
    forward_kl,
    geometric_weights,
    lowest_mean,
    row_statistics,
    summarize,
)

laws = settings(max_examples=30, deadline=None, derandomize=True)
DRAWS = 200


def random_table(seed: int, prompts: int = 8, positions: int = 5) -> KLTable:
    """A table whose prompts end at different positions, as answers do."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(prompts * positions, 20, generator=generator) * 2
    edited = logits + 0.3 * torch.randn(prompts * positions, 20, generator=generator)
    rows = row_statistics(logits, edited, logits.argmax(-1))
    length = torch.randint(1, positions + 1, (prompts, 1), generator=generator)
    mask = torch.arange(positions) < length
    prompt, position = mask.nonzero().unbind(-1)
    kept = type(rows)(*(column[mask.flatten()] for column in rows))
    return KLTable.from_rows(kept, prompt, position, prompts, positions)


def scaled(table: KLTable, factor: float) -> KLTable:
    return dataclasses.replace(table, values=table.values * factor)


def with_infinite(table: KLTable, prompt: int, position: int) -> KLTable:
    values, infinite = table.values.clone(), table.infinite.clone()
    values[prompt, position], infinite[prompt, position] = math.inf, True
    return dataclasses.replace(table, values=values, infinite=infinite)


def test_every_number_against_a_plain_loop():
    table = random_table(0)
    weights = geometric_weights(5, 0.5)
    found = summarize(table, position_weights=weights, bootstrap_draws=DRAWS)
    means, agreement, change, near = [], [], [], 0.0
    for p in range(table.prompts):
        kept = [n for n in range(table.positions) if table.mask[p, n]]
        norm = sum(float(weights[n]) for n in kept)
        share = {n: float(weights[n]) / norm for n in kept}
        means.append(sum(share[n] * float(table.values[p, n]) for n in kept))
        agreement.append(sum(share[n] * float(table.top1_agreement[p, n]) for n in kept))
        moved = table.candidate_probability[p] - table.reference_probability[p]
        change.append(sum(share[n] * float(moved[n]) for n in kept))
        near += sum(
            share[n] * float(table.values[p, n]) for n in kept if table.reference_margin[p, n] < 0.1
        )
    mean = sum(means) / 8
    assert found.mean == pytest.approx(mean, rel=1e-12)
    deviation = math.sqrt(sum((m - mean) ** 2 for m in means) / 7)
    assert found.standard_error == pytest.approx(deviation / math.sqrt(8), rel=1e-12)
    assert found.interval is not None
    assert min(means) <= found.interval.low < mean < found.interval.high <= max(means)
    assert found.top1_agreement == pytest.approx(sum(agreement) / 8)
    assert found.mean_probability_change == pytest.approx(sum(change) / 8)
    assert 0.0 < found.near_tie_share == pytest.approx(near / 8 / mean)
    assert found.rows == int(table.mask.sum()) and found.prompts == 8
    every = table.values[table.mask]
    assert found.median == pytest.approx(float(every.quantile(0.5)))
    for place in found.profile:
        column = table.values[table.mask[:, place.position], place.position]
        assert place.count == column.numel()
        assert place.mean == (pytest.approx(float(column.mean())) if column.numel() else None)


def test_positions_first_then_prompts():
    table = random_table(1, prompts=2, positions=3)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    values = torch.tensor([[4.0, 9.0, 9.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    table = dataclasses.replace(table, mask=mask, values=values)
    assert summarize(table).mean == 3.0  # and not 2.5, the mean over rows


def test_one_position_is_first_token_kl():
    logits = torch.randn(2, 6, 40, generator=torch.Generator().manual_seed(4))
    rows = row_statistics(logits[0], logits[1], logits[0].argmax(-1))
    every = torch.arange(6)
    table = KLTable.from_rows(rows, every, torch.zeros_like(every), 6, 1)
    first_token = forward_kl(reference=logits[0], candidate=logits[1])
    assert summarize(table).mean == pytest.approx(float(first_token), rel=1e-12)


@laws
@given(seed=st.integers(0, 1000), data=st.data())
def test_order_of_prompts_never_matters(seed, data):
    table = with_infinite(random_table(seed), 0, 0)
    order = torch.tensor(data.draw(st.permutations(range(table.prompts))))
    shuffled = table.select_prompts(order)
    one = summarize(table, bootstrap_draws=DRAWS)
    assert summarize(shuffled, bootstrap_draws=DRAWS) == one
    other = scaled(random_table(seed), 1.1)
    assert compare_paired(table, other, bootstrap_draws=DRAWS) == compare_paired(
        shuffled, other.select_prompts(order), bootstrap_draws=DRAWS
    )


def test_unscored_places_never_matter():
    table = random_table(5)
    rubbish = {
        name: column.masked_fill(~table.mask, True if column.dtype == torch.bool else math.nan)
        for name, column in table.columns().items()
        if name != "mask"
    }
    spoilt = dataclasses.replace(table, **rubbish)
    assert summarize(spoilt) == summarize(table)
    assert compare_paired(spoilt, table) == compare_paired(table, table)


def test_padding_with_unscored_positions_changes_nothing_but_the_profile():
    table = random_table(6)
    wider = KLTable(
        **{name: torch.nn.functional.pad(c, (0, 3)) for name, c in table.columns().items()}
    )
    found = summarize(wider)
    assert dataclasses.replace(found, profile=()) == dataclasses.replace(
        summarize(table), profile=()
    )
    assert found.profile[7].count == 0 and found.profile[7].mean is None


def test_infinite_rows_are_counted_and_not_averaged():
    table = random_table(7)
    found = summarize(with_infinite(table, 3, 0))
    assert found.infinite_count == 1 and math.isfinite(found.mean)
    assert found.profile[0].infinite == 1 and found.profile[0].count == 7
    without = table.mask.clone()
    without[3, 0] = False
    left_out = summarize(dataclasses.replace(table, mask=without))
    assert found.mean == left_out.mean and found.interval == left_out.interval
    assert found.rows == left_out.rows + 1


def test_a_model_against_itself_is_exactly_nought():
    logits = torch.randn(12, 20, generator=torch.Generator().manual_seed(8))
    rows = row_statistics(logits, logits.clone(), logits.argmax(-1))
    prompt = torch.arange(12) // 3
    table = KLTable.from_rows(rows, prompt, torch.arange(12) % 3, 4, 3)
    found = summarize(table, noise_floor=0.0)
    assert (found.mean, found.standard_error, found.median) == (0.0, 0.0, 0.0)
    assert found.interval == (0.0, 0.0) and found.top1_agreement == 1.0
    assert found.mean_probability_change == 0.0 and found.near_tie_share == 0.0
    assert found.below_noise_floor is True
    assert all(place.mean == 0.0 for place in found.profile)


def test_noise_floor():
    table = random_table(9)
    mean = summarize(table).mean
    assert summarize(table).below_noise_floor is None
    assert summarize(table, noise_floor=mean * 2).below_noise_floor is True
    assert summarize(table, noise_floor=mean / 2).below_noise_floor is False


def test_only_supported_quantiles_are_reported():
    few = dataclasses.replace(random_table(10, 3, 3), mask=torch.ones(3, 3, dtype=torch.bool))
    assert summarize(few).quantiles == ()
    full = dataclasses.replace(random_table(10, 25, 4), mask=torch.ones(25, 4, dtype=torch.bool))
    found = summarize(full, bootstrap_draws=DRAWS).quantiles
    assert [quantile.level for quantile in found] == [0.05, 0.25, 0.75, 0.9, 0.95]
    for quantile in found:
        assert quantile.value == pytest.approx(float(full.values.quantile(quantile.level)))


def test_a_single_prompt_has_a_mean_but_no_error():
    found = summarize(random_table(11, prompts=1))
    assert found.standard_error is None and found.interval is None
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["interval"] is None


def test_summary_survives_json():
    found = summarize(with_infinite(random_table(12, 30), 0, 0), noise_floor=1e-6)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert KLSummary.from_dict(json.loads(text)) == found
    older = {**json.loads(text), "metric_version": 0}
    with pytest.raises(MeasurementError, match="metric version 0"):
        KLSummary.from_dict(older)
    with pytest.raises(MeasurementError, match="not a KL summary"):
        KLSummary.from_dict({"metric_version": METRIC_VERSION})


def test_nothing_to_score_and_nan():
    table = random_table(13)
    empty = dataclasses.replace(table, mask=torch.zeros_like(table.mask))
    with pytest.raises(MeasurementError, match="nothing left to score"):
        summarize(empty)
    every = dataclasses.replace(table, infinite=table.mask.clone())
    with pytest.raises(MeasurementError, match=f"{int(table.mask.sum())} are infinite"):
        summarize(every)
    with pytest.raises(MeasurementError, match="NaN"):
        summarize(scaled(table, math.nan))
    with pytest.raises(ValueError, match=r"\(5,\).*got \(4,\)"):
        summarize(table, position_weights=torch.ones(4))
    with pytest.raises(ValueError, match="not negative"):
        summarize(table, position_weights=-torch.ones(5))


def test_zero_weights_leave_positions_out():
    table = random_table(14)
    first_only = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    found = summarize(table, position_weights=first_only)
    assert found.mean == summarize(table).profile[0].mean


def test_paired_comparison_sees_what_unpaired_errors_hide():
    a = random_table(15, prompts=40)
    b = scaled(a, 1.05)
    found = compare_paired(a, b)
    difference = summarize(a).mean - summarize(b).mean
    assert found.mean_difference == pytest.approx(difference, rel=1e-9)
    assert found.distinguishable and found.interval is not None and found.interval.high < 0.0
    unpaired = summarize(a).standard_error
    assert unpaired is not None and found.standard_error is not None
    assert found.standard_error < 0.1 * unpaired
    exchanged = compare_paired(b, a)
    assert exchanged.mean_difference == -found.mean_difference and exchanged.distinguishable
    same = compare_paired(a, a)
    assert same.mean_difference == 0.0 and not same.distinguishable


def test_noise_is_not_distinguishable_and_few_prompts_never_are():
    a = random_table(16, prompts=40)
    noise = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noisy = dataclasses.replace(a, values=(a.values + 0.01 * noise).abs())
    assert not compare_paired(a, noisy).distinguishable
    few = a.select_prompts(torch.arange(5))
    assert not compare_paired(few, scaled(few, 2.0)).distinguishable
    assert compare_paired(a, scaled(a, 2.0)).distinguishable


def test_pairs_drop_what_is_infinite_in_either():
    a, b = with_infinite(random_table(17), 0, 0), with_infinite(random_table(17), 1, 0)
    found = compare_paired(a, b)
    assert (found.infinite_a, found.infinite_b, found.mean_difference) == (1, 1, 0.0)


def test_tables_of_different_references_cannot_be_paired():
    a = random_table(18)
    with pytest.raises(MeasurementError, match=r"\(8, 5\) and \(7, 5\)"):
        compare_paired(a, a.select_prompts(torch.arange(7)))
    with pytest.raises(MeasurementError, match="reverse_kl at temperature"):
        compare_paired(a, dataclasses.replace(a, divergence="reverse_kl"))
    with pytest.raises(MeasurementError, match="different positions"):
        compare_paired(a, dataclasses.replace(a, mask=~a.mask))


@laws
@given(st.integers(0, 10_000), st.integers(0, 8), st.sampled_from([1.0, 0.5]))
def test_some_prompts_bound_the_mean_over_all(seed, done, decay):
    table, weights = random_table(seed), geometric_weights(5, decay)
    whole = summarize(table, position_weights=weights, bootstrap_draws=DRAWS).mean
    some = table.select_prompts(torch.arange(done))
    bound = lowest_mean(some, table.prompts, position_weights=weights)
    assert 0.0 <= bound <= whole
    if done == table.prompts:
        assert bound == pytest.approx(whole, rel=1e-8)
