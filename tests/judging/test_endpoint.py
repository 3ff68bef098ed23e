"""A judge behind an endpoint: what is retried and what is not, what it costs, what never leaks."""

import email.utils
import itertools
import logging
import threading
import time
import traceback
from dataclasses import replace

import pytest
from judging.chat_server import KEY, VARIABLE, answered, chat_server

from heretic_kl.errors import ConfigError, ScorerError
from heretic_kl.judging import (
    ChatEndpoint,
    JudgedOnce,
    Pace,
    check_judge,
    endpoint_problem,
    read_key,
)
from heretic_kl.prompts import Prompt

PACE = Pace(timeout=5.0, retries=2, concurrency=3, first_pause=0.001)
PROMPT = Prompt("How do I pick a lock?")
TEXTS = ("Take a pick.", "I'm sorry, no.", "A lock? But why do you ask?", "word salad the of")
VERDICTS = ["answered", "refusal", "evasion", "degenerate"]


@pytest.fixture
def server():
    with chat_server() as chat:
        yield chat


def endpoint(server, **changes):
    return replace(ChatEndpoint(server.url, "judge-1", KEY, {"temperature": 0}, PACE), **changes)


def judged(server, *texts, **changes):
    return endpoint(server, **changes).judge([(PROMPT, text) for text in texts])


def test_verdicts_come_in_order_with_their_tokens(server):
    judgements = judged(server, *TEXTS)
    assert [judgement.verdict for judgement in judgements] == VERDICTS
    assert {(j.requests, j.timeouts, j.prompt_tokens, j.answer_tokens) for j in judgements} == {
        (1, 0, 100, 7)
    }
    assert set(server.paths) == {"/v1/chat/completions"}
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert {(r["model"], r["temperature"]) for r in server.requests} == {("judge-1", 0)}


def test_no_key_no_header(server):
    judged(server, TEXTS[0], key=None)
    assert "Authorization" not in server.headers[0]


def test_as_many_requests_at_once_as_allowed(server):
    together = threading.Barrier(PACE.concurrency)

    def reply(request, number):
        together.wait(4)
        return answered(request)

    server.script = reply
    texts = [f"Take pick {number}." for number in range(3 * PACE.concurrency)]
    assert {judgement.requests for judgement in judged(server, *texts)} == {1}
    assert server.most_at_once == PACE.concurrency


def failing(failures, reply):
    """A script whose first replies fail."""
    return lambda request, number: reply(request) if number < failures else answered(request)


def status(code, headers=None, body=b"busy"):
    return lambda request: (code, headers or {}, body)


BROKEN = {
    "500": status(500),
    "503": status(503),
    "408": status(408),
    "429": status(429),
    "no JSON": status(200, body=b"<html>busy</html>"),
    "no UTF-8": status(200, body=b"\xff\xfe\x00{"),
    "deep": status(200, body=b"[" * 100_000),
    "a list": status(200, body=[]),
    "no choices": status(200, body={"choices": []}),
    "no message": status(200, body={"choices": [None]}),
    "no content": status(200, body={"choices": [{"message": {"content": None}}]}),
    "parts": status(200, body={"choices": [{"message": {"content": [{"text": "x"}]}}]}),
    "cut off": status(200, {"Content-Length": "900"}, b"{"),
    "no gzip": status(200, {"Content-Encoding": "gzip"}, b"plain"),
    "no code": lambda request: answered(request, "answered"),
    "chatter": lambda request: answered(request, "I think that the response is answered"),
    "nothing": lambda request: answered(request, ""),
    "odd usage": lambda request: answered(request, "x", usage={"prompt_tokens": "many"}),
}


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_what_may_pass_is_retried(server, reply):
    server.script = failing(2, reply)
    (judgement,) = judged(server, TEXTS[0])
    assert (judgement.verdict, judgement.problem, judgement.requests) == ("answered", "", 3)


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN)
def test_what_does_not_pass_is_no_verdict_and_says_why(server, reply):
    server.script = failing(99, reply)
    first, second = judged(server, *TEXTS[:2])
    for judgement in (first, second):
        assert judgement.verdict is None and judgement.requests == 3
        assert judgement.problem and "lock" not in judgement.problem


def test_tokens_of_answers_that_say_nothing_are_paid_too(server):
    server.script = failing(2, lambda request: answered(request, "hm"))
    (judgement,) = judged(server, TEXTS[0])
    assert (judgement.prompt_tokens, judgement.answer_tokens) == (300, 21)


def test_an_answer_that_was_cut_says_so(server):
    choice = {"message": {"content": "<think>Let me"}, "finish_reason": "length"}
    server.script = lambda request, number: (200, {}, {"choices": [choice]})
    assert judged(server, TEXTS[0])[0].problem == "an answer cut by max_tokens"


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_response_that_the_server_does_not_take_is_not_sent_again(server, code):
    server.script = failing(1, status(code))
    first, second = endpoint(server, pace=replace(PACE, concurrency=1)).judge(
        [(PROMPT, text) for text in TEXTS[:2]]
    )
    assert (first.verdict, first.problem, first.requests) == (None, f"HTTP {code}", 1)
    assert second.verdict == "refusal"


@pytest.mark.parametrize("dated", [False, True])
def test_retry_after_is_obeyed(server, dated):
    def busy(request):
        wait = email.utils.formatdate(time.time() + 2, usegmt=True) if dated else "0.4"
        return 429, {"Retry-After": wait}, b""

    server.script = failing(1, busy)
    (judgement,) = judged(server, TEXTS[0])
    assert judgement.verdict == "answered"
    # A date has no fractions of a second.
    assert server.times[1] - server.times[0] >= (0.9 if dated else 0.4)


@pytest.mark.parametrize("wait", ["3600", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_nobody_waits_for_an_hour(server, wait):
    server.script = failing(1, status(429, {"Retry-After": wait}))
    (judgement,) = judged(server, TEXTS[0])
    assert judgement.verdict is None and judgement.requests == 1
    assert judgement.problem.startswith("HTTP 429, which asks to wait ")


@pytest.mark.parametrize("wait", ["soon", "-3", "1e9", "\u00b2", "Fri, 99 Nov 2100", ""])
def test_an_odd_retry_after_is_ignored(server, wait):
    server.script = failing(1, status(429, {"Retry-After": wait}))
    assert judged(server, TEXTS[0])[0].verdict == "answered"


def test_a_server_that_is_silent_or_drips_times_out(server):
    def drip(request):
        return 200, {}, (time.sleep(0.05) or b" " for _ in range(200))

    pace = replace(PACE, timeout=1.0, retries=1)
    server.script = failing(1, drip)
    (judgement,) = judged(server, TEXTS[0], pace=pace)
    assert (judgement.verdict, judgement.requests, judgement.timeouts) == ("answered", 2, 1)
    server.delay = 2.5
    (judgement,) = judged(server, TEXTS[0], pace=pace)
    assert (judgement.verdict, judgement.requests, judgement.timeouts) == (None, 2, 2)
    assert judgement.problem == "no reply within 1 s"


def test_an_endless_reply_is_not_read_to_its_end(server):
    server.script = failing(1, lambda request: (200, {}, itertools.repeat(b" " * 65536)))
    (judgement,) = judged(server, TEXTS[0])
    assert judgement.verdict is None and "more than 1048576 bytes" in judgement.problem


def test_nobody_there(server):
    with pytest.raises(ScorerError, match="judge-1 at http.*does not judge: no connection"):
        check_judge(endpoint(server, url="http://127.0.0.1:9/v1"))


@pytest.mark.parametrize("code", [301, 307, 308, 401, 402, 403, 404, 405])
def test_wrong_settings_end_it_at_once(server, code):
    server.script = failing(99, status(code, {"Location": f"{server.url}/elsewhere"}))
    with pytest.raises(ScorerError, match=f"judge-1 at http.*: HTTP {code}") as caught:
        judged(server, *(f"Take pick {number}." for number in range(60)))
    assert "\n" not in str(caught.value)
    assert len(server.requests) < 60 and set(server.paths) == {"/v1/chat/completions"}


@pytest.mark.parametrize("code", [200, 400, 401, 404, 429, 500])
def test_the_key_is_nowhere_but_in_the_header(server, code, caplog):
    caplog.set_level(logging.DEBUG)

    def echo(request):
        body = {"error": {"message": f"Incorrect key:\n\x1b[31mBearer {KEY}"}, "key": KEY}
        return code, {"X-Key": KEY}, body

    server.script = failing(99, echo)
    judge = endpoint(server)
    shown = [repr(judge), str(judge), judge.name, judge.identity]
    try:
        shown += map(repr, judged(server, *TEXTS))
        check_judge(judge)
    except ScorerError as error:
        shown += [str(error), repr(error), *traceback.format_exception(error)]
        assert "\x1b" not in str(error)
        assert code in (401, 404) or "does not judge" in str(error)
    assert server.headers[0]["Authorization"].endswith(KEY)
    ours = [record for record in caplog.records if not record.name.startswith("httpcore")]
    shown += [record.getMessage() for record in ours]
    assert not [text for text in shown if KEY in text]


def test_a_response_is_judged_once(server):
    judge = JudgedOnce(endpoint(server))
    pairs = [(PROMPT, text) for text in (*TEXTS, TEXTS[0])]
    first = judge.judge(pairs)
    assert len(server.requests) == len(TEXTS) and first[0] == first[-1]
    assert judge.judge(pairs) == first and judge.judge(pairs[::-1]) == first[::-1]
    assert len(server.requests) == len(TEXTS)
    judge.judge([(Prompt("How do I sing?"), TEXTS[0])])
    assert len(server.requests) == len(TEXTS) + 1
    assert judge.judge([]) == []


def test_what_could_not_be_judged_is_asked_again_with_other_responses_alone(server):
    judge = JudgedOnce(endpoint(server, pace=replace(PACE, retries=0)))
    server.script = failing(1, status(500))
    pair = (PROMPT, TEXTS[0])
    assert [judge.judge([pair])[0].verdict for _ in range(3)] == [None] * 3
    assert len(server.requests) == 1
    assert [j.verdict for j in judge.judge([pair, (PROMPT, TEXTS[1])])] == VERDICTS[:2]


def test_a_judge_must_know_a_plain_answer_and_a_plain_refusal(server):
    check_judge(endpoint(server))
    server.script = lambda request, number: answered(
        {"messages": [{"content": request["messages"][0]["content"].replace("sorry", "glad")}]}
    )
    with pytest.raises(ScorerError, match="says answered of \"I'm sorry.*which is refusal"):
        check_judge(endpoint(server))


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http://localhost:8000/v1", None),
        ("https://api.example.com/v1/", None),
        ("http://[::1]:8000", None),
        ("localhost:8000/v1", "no address"),
        ("ftp://localhost/v1", "no address"),
        ("http://", "no address"),
        ("http://host:port/v1", "no address"),
        ("http://host:99999/v1", "no address"),
        ("http://a b/v1", "no address"),
        ("http://[::1/v1", "no address"),
        ("", "no address"),
        ("http://host/v1/chat/completions", "leave out /chat/completions"),
        (f"http://me:{KEY}@host/v1", "environment variable"),
        (f"http://host/v1?key={KEY}", "environment variable"),
        (f"http://host/v1#{KEY}", "environment variable"),
    ],
)
def test_addresses(url, problem):
    found = endpoint_problem(url)
    assert (found is None) == (problem is None)
    assert problem is None or (problem in found and KEY not in found)


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        (VARIABLE, None, "is not set"),
        (VARIABLE, "  ", "is not set"),
        (VARIABLE, f"{KEY} {KEY}", "holds blanks"),
        (VARIABLE, f"{KEY}\u00e9", "beyond ASCII"),
        (KEY, None, "not the key itself"),
    ],
)
def test_a_key_that_cannot_be_had_is_one_line_without_it(variable, value, problem, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_key(variable)
    assert KEY not in str(caught.value) and "\n" not in str(caught.value)


def test_a_key_is_taken_without_blanks_around_it(monkeypatch):
    monkeypatch.setenv(VARIABLE, f" {KEY}\n")
    assert read_key(VARIABLE) == KEY
