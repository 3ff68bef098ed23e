"""Teacher-forced requests that share a pass: the same numbers as each alone."""

import pytest
import torch

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import Engine
from heretic_kl.engine.memory_limits import MemoryLimits
from heretic_kl.engine.teacher_forcing.reference import KeptLogits
from heretic_kl.kl import DivergenceReduction, row_statistics
from heretic_kl.prompts import Prompt
from heretic_kl.requests import PartialRows, Sampling, TeacherForcedRequest
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

WORDS = "how do I make a cake bomb please tell me about the weather in Rome".split()
SYSTEM = "you need to know what the weather is and I will not wait for it now"
PROMPTS = tuple(Prompt(" ".join(WORDS[i % 5 : 5 + i]), SYSTEM) for i in range(1, 9))
OTHERS = tuple(Prompt(" ".join(WORDS[3 : 5 + i]), SYSTEM) for i in range(1, 6))


def candidate_only(none, candidate, tokens):
    assert not len(none)
    return (candidate.logsumexp(-1), tokens)


REQUESTS = [
    TeacherForcedRequest(PROMPTS, 5, row_statistics),
    TeacherForcedRequest(OTHERS, 3, candidate_only, reference_logits=False),
    TeacherForcedRequest(PROMPTS, 2, row_statistics),
    TeacherForcedRequest(OTHERS, 4, row_statistics, Sampling(7)),
]


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny_model(save_tiny_model(folder / "m", TINY_CONFIGS[request.param]()))


def plan_of(lm, seed):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(seed))
    return {key: ablation_operator(direction, 0.8) for key in lm.architecture.facts()}


def assert_alike(ours, expected):
    for mine, theirs in zip(ours.columns, expected.columns, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)
    assert torch.equal(ours.prompt_index, expected.prompt_index)
    assert torch.equal(ours.position, expected.position)


def laid_out(lm, trees):
    return lm if trees else lm.limited(tree_problem="off")


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("cache_bytes", [0, 2**24])
@pytest.mark.parametrize("trees", [False, True])
def test_together_they_measure_as_each_alone(lm, candidates, cache_bytes, trees):
    plans = [plan_of(lm, seed) for seed in range(candidates)]
    engine = Engine(laid_out(lm, trees), batch_size=3, cache_bytes=cache_bytes)
    together = engine.measure_many(plans, REQUESTS)
    for plan, found in zip(plans, together, strict=True):
        for request, ours in zip(REQUESTS, found, strict=True):
            alone = Engine(lm.limited(tree_problem="off"), batch_size=3).measure(plan, [request])[0]
            assert_alike(ours, alone)


def test_an_unedited_model_scores_exactly_zero_in_company(lm):
    for cache_bytes, trees in ((0, True), (2**24, True), (2**24, False)):
        engine = Engine(laid_out(lm, trees), batch_size=3, cache_bytes=cache_bytes)
        for plan in (None, {}):
            for result in engine.measure(plan, REQUESTS)[::2]:
                assert not result.columns.values.any()


def test_kept_logits_change_no_bit_and_are_not_computed_again(lm, monkeypatch):
    plan, rows = plan_of(lm, 1), []
    (expected,) = Engine(lm, batch_size=3).measure(plan, REQUESTS[:1])
    keeping = Engine(lm, batch_size=3, cache_bytes=2**24)
    keeping.measure(plan, REQUESTS[:1])
    kept = keeping.limits.kept_bytes
    assert kept >= len(expected.position) * lm.head.vocabulary * 4
    own = type(lm.head).logits
    monkeypatch.setattr(
        type(lm.head), "logits", lambda head, hidden: rows.append(len(hidden)) or own(head, hidden)
    )
    (ours,) = keeping.measure(plan, REQUESTS[:1])
    assert torch.equal(ours.columns.values, expected.columns.values)
    assert sum(rows) == len(expected.position)  # the candidate's alone
    keeping.release()
    assert keeping.limits.kept_bytes == 0
    (again,) = keeping.measure(plan, REQUESTS[:1])
    assert torch.equal(again.columns.values, expected.columns.values)


def test_logits_are_kept_as_far_as_memory_is_left(lm):
    plan = plan_of(lm, 1)
    (expected,) = Engine(lm, batch_size=3).measure(plan, REQUESTS[:1])
    whole = len(expected.position) * lm.head.vocabulary * 4
    tight = Engine(lm, batch_size=3, cache_bytes=whole // 2)
    for _ in range(2):
        (ours,) = tight.measure(plan, REQUESTS[:1])
        assert torch.equal(ours.columns.values, expected.columns.values)
        assert tight.limits.kept_bytes <= whole // 2


@pytest.mark.parametrize("bytes_a_logit", [0, 4, 13])
def test_what_a_reduction_prepares_is_kept_or_else_the_logits(lm, monkeypatch, bytes_a_logit):
    made, computed, own = [], [], DivergenceReduction.prepare
    monkeypatch.setattr(
        DivergenceReduction, "prepare", lambda self, logits: made.append(1) or own(self, logits)
    )
    reference = Engine(lm, batch_size=13).reference(PROMPTS, 5)
    expected = lm.head.logits(reference.hidden)
    head = type(lm.head).logits
    monkeypatch.setattr(
        type(lm.head), "logits", lambda self, hidden: computed.append(1) or head(self, hidden)
    )
    budget = bytes_a_logit * expected.numel()
    kept = KeptLogits(reference, lm.head, MemoryLimits(13, cache_bytes=budget))
    rows, reduction = torch.arange(reference.rows), DivergenceReduction()
    first, second = kept.of(rows, reduction), kept.of(rows, reduction)
    logits = first.distribution.logits if bytes_a_logit == 13 else first
    assert torch.equal(logits, expected)
    assert (second is first) == (bytes_a_logit > 0)
    assert kept.bytes <= budget
    assert len(made) == (0 if bytes_a_logit == 0 else 1)
    assert len(computed) == (2 if bytes_a_logit == 0 else 1)
    kept.release()
    assert kept.bytes == 0


def test_who_watches_hears_of_all_requests_from_the_first_portion_on(lm, monkeypatch):
    from heretic_kl.engine import runner
    from heretic_kl.engine.teacher_forcing import forward as forcing

    monkeypatch.setattr(forcing, "PORTION_ROWS", 1)
    monkeypatch.setattr(runner, "CPU_TREE_TOKENS", 40)
    heard = []

    def watch(_candidate, known):
        heard.append(known)
        return False

    engine = Engine(lm, batch_size=13)
    (results,) = engine.measure_many([plan_of(lm, 1)], REQUESTS[:2], watch)
    assert results is not None and len(heard) > 1
    both = [known for known in heard if all(isinstance(part, PartialRows) for part in known)]
    assert both


def test_a_saved_model_is_compared_in_the_batches_of_the_original(lm):
    original = Engine(lm, batch_size=3, cache_bytes=2**24)
    original.prepare(REQUESTS)
    reread = Engine(lm, batch_size=3, original=original)
    for result in reread.measure({}, REQUESTS)[::2]:
        assert not result.columns.values.any()
