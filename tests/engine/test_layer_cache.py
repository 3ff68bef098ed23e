"""Starting at a layer, and several candidates side by side: the same numbers with less work."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import row_statistics
from heretic_kl.model import (
    CandidateRows,
    edited_by_candidate,
    find_capabilities,
    spread_boundaries,
)
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseRequest, TeacherForcedRequest
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

WORDS = "how do I make a cake bomb please tell me about the weather in Rome".split()
SYSTEM = "you need to know what the weather is and I will not wait for it now"
PROMPTS = tuple(Prompt(" ".join(WORDS[i % 5 : 5 + i]), SYSTEM) for i in range(1, 9))
FORCED = TeacherForcedRequest(PROMPTS, 5, row_statistics)
ASKED = ResponseRequest(PROMPTS, 12)
MEGABYTE = 2**20


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = TINY_CONFIGS[request.param]
    return load_tiny_model(save_tiny_model(folder / "m", config()))


def plan_of(lm, seed, *, lowest=0, weight=0.8):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(seed))
    return {
        key: ablation_operator(direction, weight)
        for key in lm.architecture.facts()
        if key.layer >= lowest
    }


def counted_layers(lm, calls):
    def hook(index):
        return lambda *_: calls.append(index)

    return [
        layer.self_attn.register_forward_hook(hook(index))
        if hasattr(layer, "self_attn")
        else layer.attn.register_forward_hook(hook(index))
        for index, layer in enumerate(lm.architecture.layers)
    ]


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("lowest", [1, 2])
def test_a_replayed_trunk_changes_no_number_and_runs_no_lower_layer(lm, share_prefix, lowest):
    plan = plan_of(lm, 1, lowest=lowest)
    if not share_prefix:
        lm = lm.limited(prefix_problem="off", tree_problem="off")
    whole = Engine(lm, batch_size=3)
    replaying = Engine(lm, batch_size=3, cache_bytes=MEGABYTE)
    replaying.measure(plan, [FORCED])  # records
    calls = []
    handles = counted_layers(lm, calls)
    (ours,) = replaying.measure(plan, [FORCED])
    for handle in handles:
        handle.remove()
    assert calls and min(calls) == lowest
    (expected,) = whole.measure(plan, [FORCED])
    assert torch.equal(ours.columns.values, expected.columns.values)
    assert not any("forward" in vars(layer) for layer in lm.architecture.layers)


def test_an_edit_at_the_first_layer_runs_them_all(lm):
    plan = plan_of(lm, 1)
    (ours,) = Engine(lm, batch_size=3, cache_bytes=MEGABYTE).measure(plan, [FORCED])
    (expected,) = Engine(lm, batch_size=3).measure(plan, [FORCED])
    assert torch.equal(ours.columns.values, expected.columns.values)


def test_a_trunk_that_does_not_fit_or_does_not_reproduce_is_left_with_a_reason(lm, monkeypatch):
    from heretic_kl.model.forward import layer_cache as module

    plan, notes = plan_of(lm, 1, lowest=1), []
    (expected,) = Engine(lm, batch_size=3).measure(plan, [FORCED])
    (ours,) = Engine(lm, batch_size=3, cache_bytes=10, notify=notes.append).measure(plan, [FORCED])
    assert "left of cache_memory_mb" in notes[-1]
    assert torch.equal(ours.columns.values, expected.columns.values)

    def scrambled(layers, boundary, hidden, **options):
        return own(layers, boundary, hidden.flip(-1), **options)

    own = module.resumed_at
    monkeypatch.setattr(module, "resumed_at", scrambled)
    allowed = find_capabilities(lm)
    assert "states differ by up to" in allowed.resume_problem
    assert "states differ by up to" in allowed.cached_resume_problem
    limited = lm.limited(**vars(allowed))
    (ours,) = Engine(limited, batch_size=3, cache_bytes=MEGABYTE).measure(plan, [FORCED])
    assert torch.equal(ours.columns.values, expected.columns.values)


def test_boundaries_are_spread_within_the_budget():
    assert spread_boundaries(30, 100, 10**9) == tuple(range(1, 30))
    assert spread_boundaries(30, 100, 250) == (10, 20)
    assert spread_boundaries(30, 100, 99) == ()
    assert spread_boundaries(1, 100, 10**9) == ()


@pytest.mark.parametrize("cache_bytes", [0, MEGABYTE])
def test_candidates_side_by_side_measure_as_each_alone(lm, cache_bytes):
    plans = [plan_of(lm, 1), plan_of(lm, 2, lowest=1), {}, plan_of(lm, 3, lowest=2, weight=1.2)]
    engine = Engine(lm, batch_size=3, cache_bytes=cache_bytes)
    together = engine.measure_many(plans, [FORCED, ASKED])
    for plan, (forced, asked) in zip(plans, together, strict=True):
        alone_forced, alone_asked = Engine(lm, batch_size=3).measure(plan, [FORCED, ASKED])
        torch.testing.assert_close(
            forced.columns.values, alone_forced.columns.values, rtol=1e-3, atol=1e-9
        )
        assert asked.texts == alone_asked.texts


def test_edited_candidates_above_a_common_boundary_start_there(lm):
    plans = [plan_of(lm, 1, lowest=1), plan_of(lm, 2, lowest=2)]
    engine = Engine(lm, batch_size=8, cache_bytes=MEGABYTE)
    engine.measure_many(plans, [FORCED])
    calls = []
    handles = counted_layers(lm, calls)
    engine.measure_many(plans, [FORCED])
    for handle in handles:
        handle.remove()
    assert min(calls) == 1


def test_rows_that_are_done_leave_their_lane(lm):
    class Decided:
        def __init__(self, words):
            self.words = words

        def decided(self, text):
            return len(text.split()) >= self.words

    plans = [plan_of(lm, seed) for seed in range(3)]
    asked = ResponseRequest(PROMPTS, 20, Decided(3))
    engine = Engine(lm, batch_size=8)
    for plan, (responses,) in zip(plans, engine.measure_many(plans, [asked]), strict=True):
        assert responses == Engine(lm, batch_size=8).measure(plan, [asked])[0]


def test_running_out_of_memory_halves_the_candidates_first(lm, monkeypatch):
    from heretic_kl.engine.teacher_forcing import passes as module

    own, notes = module.forced_portions, []

    def limited(lm, batches, start):
        if start.candidates > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(lm, batches, start)

    monkeypatch.setattr(module, "forced_portions", limited)
    engine = Engine(lm, batch_size=4, notify=notes.append)
    plans = [plan_of(lm, seed) for seed in range(4)]
    found = engine.measure_many(plans, [FORCED])
    assert len(found) == 4 and engine.batch_size == 4
    assert notes == [f"out of memory: {k} candidates run at once now" for k in (2, 1)]


def test_running_out_of_memory_with_one_candidate_is_one_line(lm, monkeypatch):
    from heretic_kl.engine.teacher_forcing import requests as module

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module.ReducedRows, "add", full)
    with pytest.raises(MeasurementError, match="out of memory with a single prompt and a single"):
        Engine(lm, batch_size=4).measure(plan_of(lm, 1), [FORCED])


def test_all_references_share_one_trunk_budget(lm):
    engine = Engine(lm, batch_size=4, cache_bytes=40_000)
    plan = plan_of(lm, 1, lowest=2)
    for tokens in range(1, 9):
        engine.measure(plan, [TeacherForcedRequest(PROMPTS, tokens, row_statistics)])
    assert 0 <= engine.limits.cache_left < 40_000


def test_a_trunk_that_memory_has_no_room_for_is_left_with_a_reason(lm, monkeypatch):
    from heretic_kl.engine.teacher_forcing import passes as module

    own, notes = module.run_forced, []

    def limited(lm, batches, *start):
        if start and start[0].layer_cache is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(lm, batches, *start)

    plan = plan_of(lm, 1, lowest=1)
    (expected,) = Engine(lm, batch_size=4).measure(plan, [FORCED])
    monkeypatch.setattr(module, "run_forced", limited)
    engine = Engine(lm, batch_size=4, cache_bytes=MEGABYTE, notify=notes.append)
    (ours,) = engine.measure(plan, [FORCED])
    assert "cache memory is now" in notes[0] and engine.batch_size == 4
    assert torch.equal(ours.columns.values, expected.columns.values)


def test_lanes_know_their_rows(lm):
    candidate_rows = CandidateRows([2, 0, 3])
    assert list(candidate_rows.slices()) == [(0, slice(0, 2)), (2, slice(2, 5))]
    candidate_rows.set_rows([0, 2, 2])
    assert candidate_rows.counts == [1, 0, 2] and candidate_rows.rows == 3
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    with edited_by_candidate(lm.architecture, [plan_of(lm, 1)], candidate_rows):
        with pytest.raises(MeasurementError, match="2 rows for 3 in the batch"):
            lm.model(input_ids=tokens)


def test_trunks_are_given_back_and_recorded_anew(lm):
    engine = Engine(lm, batch_size=4, cache_bytes=MEGABYTE)
    plan = plan_of(lm, 1, lowest=2)
    before = engine.measure(plan, [FORCED, ASKED])
    assert engine.limits.cache_left < MEGABYTE
    engine.release()
    assert engine.limits.cache_left == MEGABYTE
    after = engine.measure(plan, [FORCED, ASKED])
    assert torch.equal(before[0].columns.values, after[0].columns.values)
    assert before[1] == after[1] and engine.limits.cache_left < MEGABYTE


def test_a_plans_states_and_the_reference_come_from_the_same_batches(lm, monkeypatch):
    """Memory runs out between the two: both are computed in smaller batches."""
    from heretic_kl.engine.teacher_forcing import passes as module

    own = module.forced_portions

    def limited(lm, batches, start):
        if batches.max_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(lm, batches, start)

    engine = Engine(lm, batch_size=4)
    engine.reference(PROMPTS, 3)
    monkeypatch.setattr(module, "forced_portions", limited)
    under = engine.reference_under({}, PROMPTS, 3)
    assert engine.batch_size == 2
    assert torch.equal(under.hidden, engine.reference(PROMPTS, 3).hidden)
