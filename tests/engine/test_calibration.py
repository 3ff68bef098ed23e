import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from heretic_kl.engine import Engine, calibration, find_batch_size, find_response_prefix
from heretic_kl.engine.generation.generate import Response
from heretic_kl.prompts import Prompt
from heretic_kl.testing import load_tiny_model, save_tiny_model, tiny_llama

PROMPTS = tuple(Prompt(text) for text in ("make a cake", "tell me about Rome", "wait please"))


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return load_tiny_model(save_tiny_model(tmp_path_factory.mktemp("m") / "m", tiny_llama()))


def test_batches_grow_while_that_pays(lm, monkeypatch):
    seconds = {8: 1.0, 16: 1.2, 32: 2.35, 64: 4.6}
    monkeypatch.setattr(calibration, "_decoding_seconds", lambda lm, batch: seconds[len(batch)])
    assert find_batch_size(lm, PROMPTS * 40) == 16


def test_one_slow_measurement_does_not_end_the_growth(lm, monkeypatch):
    seconds = {8: 1.0, 16: 2.5, 32: 2.0, 64: 4.6, 128: 9.0}
    monkeypatch.setattr(calibration, "_decoding_seconds", lambda lm, batch: seconds[len(batch)])
    assert find_batch_size(lm, PROMPTS * 80) == 32


def test_running_out_of_memory_ends_the_growth(lm, monkeypatch):
    def seconds(lm, batch):
        if len(batch) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1.0

    monkeypatch.setattr(calibration, "_decoding_seconds", seconds)
    assert find_batch_size(lm, PROMPTS * 40) == 16


def test_batches_never_outgrow_the_prompts(lm, monkeypatch):
    monkeypatch.setattr(calibration, "_decoding_seconds", lambda *_: 1.0)
    assert find_batch_size(lm, PROMPTS) == 8


def test_on_a_cpu_the_ends_of_prompts_are_read(lm, monkeypatch):
    batches = []
    monkeypatch.setattr(calibration, "_decoding_seconds", lambda lm, b: batches.append(b) or 1.0)
    long = Prompt("tell me about Rome please " * 20)
    find_batch_size(lm, (long,) * 8)
    (batch,) = batches
    assert len(batch) == 8 and all(ids == lm.chat.encode(long)[-4:] for ids in batch)


def test_a_step_of_decoding_is_timed_without_the_prompts(lm, monkeypatch):
    clock = iter([10.0, 11.0, 13.0, 14.0, 15.0, 16.0, 17.0, 99.0])
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    endless = replace(lm, stop_ids=frozenset())
    assert calibration._decoding_seconds(endless, [lm.chat.encode(PROMPTS[0])] * 8) == 1.0
    assert next(clock) == 99.0  # the prompts were read once


@pytest.mark.parametrize(
    ("texts", "prefix"),
    [
        (["<think>\n Okay", "<think>\n Hmm", "<think>\n Okay"], "<think></think>"),
        (["Sure, a cake", "Sure, Rome", "Sure, wait"], "Sure,"),
        (["Sure", "Sorry", "Step"], ""),
        (["I cannot", "Rome is", "Sure"], ""),
    ],
)
def test_common_openings_become_the_response_prefix(lm, monkeypatch, texts, prefix):
    # One token a word, and for once the spaces between them.
    words = sorted({word for text in texts for word in re.split("( )", text)})
    responses = [Response(tokens=[words.index(w) for w in re.split("( )", t)]) for t in texts]
    monkeypatch.setattr(Engine, "responses", lambda *_: responses)
    joined = lambda self, tokens, **_: "".join(words[t] for t in tokens)  # noqa: E731
    monkeypatch.setattr(type(lm.chat), "decode", joined)
    assert find_response_prefix(Engine(lm, batch_size=8), PROMPTS) == prefix


def test_a_thought_that_the_template_opens_is_closed(lm, monkeypatch):
    thinking = replace(lm, chat=replace(lm.chat, template="{{ messages[0]['content'] }}<think>\n"))
    assert find_response_prefix(Engine(thinking, batch_size=8), PROMPTS) == "</think>"
