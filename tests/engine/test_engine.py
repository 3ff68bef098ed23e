"""The engine against plain transformers, on tiny random models."""

import pytest
import torch
from torch.nn import functional

from heretic_kl.ablation import ablation_operator
from heretic_kl.engine import (
    ChosenTokens,
    Engine,
    Runner,
    forced_sequences,
    generate_responses,
    mean_kl,
    measure_noise_floor,
    stream_response,
)
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.kl import Head, RowStatistics, row_statistics
from heretic_kl.model import edited
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseRequest, Sampling, TeacherForcedRequest
from heretic_kl.scoring import RefusalRule
from heretic_kl.testing import TINY_CONFIGS, load_tiny_model, save_tiny_model

WORDS = "how do I make a cake bomb please tell me about the weather in Rome".split()
PROMPTS = tuple(Prompt(" ".join(WORDS[i % 5 : 5 + i])) for i in range(1, 9))


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def lm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return load_tiny_model(save_tiny_model(folder / "m", TINY_CONFIGS[request.param]()))


@pytest.fixture
def plan(lm):
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(3))
    return {key: ablation_operator(direction, 0.8) for key in lm.architecture.facts()}


def plain_response(lm, ids, tokens):
    """One row, no cache, no padding: greedy decoding as its definition says."""
    ids, response = list(ids), []
    for _ in range(tokens):
        with torch.inference_mode():
            logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token in lm.stop_ids:
            break
        ids.append(token)
        response.append(token)
    return response


def plain_kl(lm, plan, prompt, response):
    """KL at every scored position, from full logits of one unpadded row in float64."""
    ids = torch.tensor([[*lm.chat.encode(prompt), *response[:-1]]])
    start = len(lm.chat.encode(prompt)) - 1
    with torch.inference_mode():
        before = lm.model(input_ids=ids).logits[0, start:].double().log_softmax(-1)
        with edited(lm.architecture, plan):
            after = lm.model(input_ids=ids).logits[0, start:].double().log_softmax(-1)
    return functional.kl_div(after, before, reduction="none", log_target=True).sum(-1)


def kl_result(engine, plan, prompts, tokens):
    request = TeacherForcedRequest(prompts, tokens, row_statistics)
    (result,) = engine.measure(plan, [request])
    assert isinstance(result.columns, RowStatistics)
    return result


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_answers_equal_plain_decoding(lm, plan, batch_size):
    engine = Engine(lm, batch_size=batch_size)
    with edited(lm.architecture, plan):
        expected = [
            lm.chat.decode(plain_response(lm, lm.chat.encode(prompt), 12)) for prompt in PROMPTS
        ]
    (result,) = engine.measure(plan, [ResponseRequest(PROMPTS, 12)])
    assert list(result.texts) == expected


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_teacher_forced_kl_equals_full_logits_of_each_prompt_alone(lm, plan, tokens):
    engine = Engine(lm, batch_size=3)
    result = kl_result(engine, plan, PROMPTS, tokens)
    reference = engine.reference(PROMPTS, tokens)
    for index, prompt in enumerate(PROMPTS):
        expected = plain_kl(lm, plan, prompt, list(forced_sequences(reference)[index].response))
        ours = result.columns.values[result.prompt_index == index]
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


def test_one_token_is_first_token_kl(lm, plan):
    """Against an independent computation from the first answer token's logits, to 1e-5."""
    result = kl_result(Engine(lm, batch_size=4), plan, PROMPTS, 1)
    ours = float(result.columns.values.mean())
    total = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([lm.chat.encode(prompt)])
        with torch.inference_mode():
            p = lm.model(input_ids=ids).logits[0, -1].double().softmax(-1)
            with edited(lm.architecture, plan):
                q = lm.model(input_ids=ids).logits[0, -1].double().softmax(-1)
        total += float((p * (p / q).log()).sum())
    assert ours == pytest.approx(total / len(PROMPTS), abs=1e-5)


def test_an_unedited_model_scores_exactly_zero(lm):
    for plan in (None, {}):
        result = kl_result(Engine(lm, batch_size=3), plan, PROMPTS, 6)
        assert torch.equal(result.columns.values, torch.zeros_like(result.columns.values))


def test_reference_answers_include_the_end_token_and_stop_there(lm):
    engine = Engine(lm, batch_size=8)
    reference = engine.reference(PROMPTS, 30)
    sequences = forced_sequences(reference)
    assert [s.prompt for s in sequences] == [lm.chat.encode(prompt) for prompt in PROMPTS]
    for sequence in sequences:
        assert 1 <= len(sequence.response) <= 30
        assert not set(sequence.response[:-1]) & lm.stop_ids
        assert len(sequence.response) == 30 or sequence.response[-1] in lm.stop_ids
    assert len(reference.hidden) == sum(len(s.response) for s in sequences)


def test_forced_sequences_score_the_positions_that_predict_the_answer():
    sequence = ForcedSequence(prompt=(1, 2, 3), response=(7, 8, 9))
    assert sequence.fed == (1, 2, 3, 7, 8)
    assert list(sequence.scored) == [2, 3, 4]


class Decided:
    """A rule that is satisfied from some length on."""

    def __init__(self, words):
        self.words = words

    def decided(self, text):
        return len(text.split()) >= self.words


def test_rows_stopped_by_a_rule_are_prefixes_of_the_whole_answers(lm, plan):
    engine = Engine(lm, batch_size=8)
    (whole,) = engine.measure(plan, [ResponseRequest(PROMPTS, 20)])
    (cut,) = engine.measure(plan, [ResponseRequest(PROMPTS, 20, Decided(4))])
    for long, short in zip(whole.texts, cut.texts, strict=True):
        assert long.startswith(short)
        assert short == long or len(short.split()) == 4


def test_equal_budgets_share_one_generation_and_whole_answers_win(lm, plan, monkeypatch):
    from heretic_kl.engine.generation import candidates as responding

    calls = []
    own = responding.generate_responses

    def counted(lm, encoded, max_tokens, rules, **options):
        calls.append(rules)
        return own(lm, encoded, max_tokens, rules, **options)

    monkeypatch.setattr(responding, "generate_responses", counted)
    engine = Engine(lm, batch_size=8)
    first, second = Decided(3), Decided(6)
    requests = [ResponseRequest(PROMPTS, 10, first), ResponseRequest(PROMPTS, 10, second)]
    one, two = engine.measure(plan, requests)
    assert len(calls) == 1 and set(calls[0]) == {first, second}
    assert one.texts == two.texts
    engine.measure(plan, [*requests, ResponseRequest(PROMPTS, 10)])
    assert calls[1] == ()


def test_what_the_reference_says_is_computed_once(lm, monkeypatch):
    engine = Engine(lm, batch_size=8)
    request = ResponseRequest(PROMPTS, 6, RefusalRule())
    (first,) = engine.measure(None, [request])
    monkeypatch.setattr(Runner, "responses", None)
    (second,) = engine.measure(None, [request])
    assert first == second


def test_running_out_of_memory_halves_the_batch_and_keeps_zero_exact(lm, monkeypatch):
    from heretic_kl.engine import runner
    from heretic_kl.engine.teacher_forcing import passes

    notes, run, states = [], passes.forced_portions, runner.forced_portions

    def limited_run(lm, batches, *start):
        if batches.max_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(lm, batches, *start)

    def limited_states(lm, batches, *start):
        if batches.max_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return states(lm, batches, *start)

    engine = Engine(lm, batch_size=8, notify=notes.append)
    engine.reference(PROMPTS, 4)  # from batches of 8
    monkeypatch.setattr(passes, "forced_portions", limited_run)
    monkeypatch.setattr(runner, "forced_portions", limited_states)
    result = kl_result(engine, {}, PROMPTS, 4)
    assert engine.batch_size == 2 and len(notes) == 2
    assert float(result.columns.values.max()) == 0.0


def test_another_model_is_measured_against_the_original(lm, plan):
    engine = Engine(lm, batch_size=4)
    other = Engine(lm, batch_size=4, original=engine)
    under_plan = kl_result(engine, plan, PROMPTS, 4)
    with edited(lm.architecture, plan):
        as_model = kl_result(other, {}, PROMPTS, 4)
    assert torch.equal(under_plan.columns.values, as_model.columns.values)
    reference = engine.reference(PROMPTS, 4)
    hidden = engine.hidden_states(plan, PROMPTS, 4)
    assert mean_kl(reference.with_hidden(hidden), hidden, head=lm.head) == 0.0
    assert mean_kl(reference, hidden, head=lm.head) > 0.0


def test_running_out_of_memory_with_one_prompt_is_one_line(lm, monkeypatch):
    from heretic_kl.engine import runner as module
    from heretic_kl.errors import MeasurementError

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "forced_portions", full)
    with pytest.raises(MeasurementError, match="out of memory with a single prompt"):
        Engine(lm, batch_size=4).reference(PROMPTS, 2)


def test_prepared_references_are_the_unedited_models(lm, plan):
    request = TeacherForcedRequest(PROMPTS, 4, row_statistics)
    engine = Engine(lm, batch_size=4)
    engine.prepare([request, ResponseRequest(PROMPTS, 2)])
    with edited(lm.architecture, plan):
        (result,) = Engine(lm, batch_size=4, original=engine).measure({}, [request])
    assert float(result.columns.values.mean()) > 0


def test_streaming_gives_the_greedy_answer(lm):
    ids = lm.chat.encode(PROMPTS[2])
    whole = lm.chat.decode(plain_response(lm, ids, 15))
    assert "".join(stream_response(lm, ids, 15)) == whole


def test_a_warmer_stream_is_drawn_by_its_seed(lm):
    ids = lm.chat.encode(PROMPTS[2])
    greedy, cold = stream_response(lm, ids, 15), stream_response(lm, ids, 15, 1e-6, seed=3)
    assert "".join(greedy) == "".join(cold)
    texts = ["".join(stream_response(lm, ids, 15, 2.0, seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def noise_floor(lm, **options):
    engine = Engine(lm, batch_size=4)
    layers = lm.architecture.layers
    return measure_noise_floor(engine.runner, engine.reference(PROMPTS, 4), layers, **options)


def test_noise_floors(lm):
    floor = noise_floor(lm)
    assert 0 <= floor.batching < 1e-9
    assert floor.batching < floor.rounding < 1e-2
    assert floor.value == floor.batching
    assert noise_floor(lm, temperature=4.0).rounding < floor.rounding
    assert "bfloat16 rounding" in floor.text


def test_without_known_layers_only_the_batching_floor_is_measured(lm):
    engine = Engine(lm, batch_size=4)
    floor = measure_noise_floor(engine.runner, engine.reference(PROMPTS, 4), None)
    assert floor.rounding is None and "rounding" not in floor.text


def test_rounding_costs_something_in_low_precision_too(tmp_path):
    folder = save_tiny_model(tmp_path / "m", TINY_CONFIGS["llama"]())
    assert noise_floor(load_tiny_model(folder, dtype="bfloat16")).rounding > 1e-6


def drawn(lm, prompts, batch_size, seed):
    runner = Engine(lm, batch_size=batch_size).runner
    sampling = None if seed is None else Sampling(seed)
    encoded = [lm.chat.encode(prompt) for prompt in prompts]
    return [r.reference_tokens(10) for r in runner.responses(encoded, 10, sampling=sampling)]


def test_drawn_answers_depend_on_seed_and_prompt_alone(lm):
    first = drawn(lm, PROMPTS, 8, seed=1)
    assert first == drawn(lm, PROMPTS, 2, seed=1)
    assert first[::-1] == drawn(lm, PROMPTS[::-1], 8, seed=1)
    assert first != drawn(lm, PROMPTS, 8, seed=2)
    assert first != drawn(lm, PROMPTS, 8, seed=None)


def test_tokens_are_drawn_in_proportion_to_their_probability():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    rows = [(row,) for row in range(4000)]
    draw = ChosenTokens(rows, Sampling(7))
    tokens = torch.tensor(draw(probabilities.log().expand(4000, 4), range(4000)))
    shares = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(shares, probabilities, atol=0.03, rtol=0)
    assert shares[1] == 0


def test_drawn_answers_are_scored_like_greedy_ones(lm, plan):
    engine = Engine(lm, batch_size=4)
    request = TeacherForcedRequest(PROMPTS, 5, row_statistics, Sampling(3))
    (zero,) = engine.measure({}, [request])
    assert float(zero.columns.values.max()) == 0.0
    (some,) = engine.measure(plan, [request])
    assert float(some.columns.values.min()) >= 0.0 < float(some.columns.values.max())


def test_residual_means_do_not_depend_on_batches(lm):
    one = Engine(lm, batch_size=1).residual_mean(PROMPTS, 1.0)
    many = Engine(lm, batch_size=8).residual_mean(PROMPTS, 1.0)
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-5)


def test_no_prompts_and_no_budget_give_no_tokens(lm):
    assert generate_responses(lm, [], 5) == []
    (response,) = generate_responses(lm, [[3, 4]], 0)
    assert response.tokens == [] and not response.done
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Engine(lm, batch_size=0)


def test_logits_of_the_reference_are_computed_only_where_they_are_read(lm, plan, monkeypatch):
    """A refusal's own tokens, say, need the candidate's logits alone."""
    rows = []
    own = Head.logits

    def counted(self, hidden, **options):
        rows.append(len(hidden))
        return own(self, hidden, **options)

    def kept(reference, candidate, tokens):
        chosen = candidate.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        return (chosen, torch.full_like(chosen, len(reference)))

    both = TeacherForcedRequest(PROMPTS, 4, kept)
    alone = TeacherForcedRequest(PROMPTS, 4, kept, reference_logits=False)
    engine = Engine(lm, batch_size=4)
    engine.prepare([both])
    monkeypatch.setattr(Head, "logits", counted)
    first, second = (engine.measure(plan, [request])[0] for request in (both, alone))
    total = len(first.prompt_index)
    assert sum(rows) == 3 * total
    assert torch.equal(first.columns[0], second.columns[0])
    assert float(second.columns[1].max()) == 0.0 < float(first.columns[1].min())
