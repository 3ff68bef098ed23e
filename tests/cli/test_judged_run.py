"""A search that a judge steers, from the command line; its key reaches the server alone."""

import json
import re

import pytest
from judging.chat_server import KEY, VARIABLE, answered, chat_server

from heretic_kl.cli import main as cli
from heretic_kl.events import ResponsesJudged
from heretic_kl.scoring import agreement_text


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv(VARIABLE, KEY)
    with chat_server() as chat:
        yield chat


def judged_by(server, folder, **settings):
    words = ["--study-name", "judged", "--study-dir", str(folder)]
    words += ["--trials", "2", "--scorers.refusals.role", "monitor"]
    words += ["--scorers.judge.role", "minimize"]
    settings = {
        "endpoint": server.url,
        "model": "j",
        "retries": 0,
        "max_response_tokens": 4,
    } | settings
    for name, value in settings.items():
        words += [f"--scorers.judge.settings.{name}", str(value)]
    return words


def flat(text):
    return " ".join(text.split())


def everything_in(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_judge_steers_a_search_and_the_key_stays_in_the_header(server, call, tmp_path):
    words = judged_by(server, tmp_path / "s", key_variable=VARIABLE, prompt_price=2)
    code, out, err = call(*words, "--debug", "--pick", "knee", "--save", str(tmp_path / "out"))
    assert code == 0, err
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    written = everything_in(tmp_path)
    assert VARIABLE.encode() in written and b"judge" in written
    assert KEY.encode() not in written and KEY not in out + err
    code, shown, _ = call("show", "judged", "--study-dir", str(tmp_path / "s"), "--trial", "0")
    assert code == 0
    for row in ("agreement with phrases", f"j at {server.url}", "300 + 21 tokens, cost 0.0006"):
        assert row in shown, shown
    count = len(server.requests)
    more = judged_by(server, tmp_path / "s", key_variable=VARIABLE, retries=1, concurrency=2)
    assert call(*more, "--trials", "3")[0] == 0  # the same study
    assert len(server.requests) > count


def test_no_study_says_where_responses_and_a_key_are_sent(server, call, tmp_path):
    """Whoever made a study could else read any variable of the environment."""
    words = judged_by(server, tmp_path / "s", key_variable=VARIABLE)
    assert call(*words, "--trials", "1", "--test-trials", "0")[0] == 0
    server.requests.clear()
    server.headers.clear()
    save = ["save", "judged", "--study-dir", str(tmp_path / "s"), "--trial", "0"]
    save += ["-o", str(tmp_path / "out")]
    for command in (save, ["worker", "judged", *save[2:4]]):
        code, _, err = call(*command)
        assert code == 2 and "--scorers.judge.settings.endpoint URL" in err
    assert not server.requests
    code, _, err = call(*save, "--scorers.judge.settings.endpoint", server.url)
    assert code == 0, err
    assert server.requests and all("Authorization" not in headers for headers in server.headers)
    server.requests.clear()
    code, _, err = call(*save[:-1], str(tmp_path / "unjudged"), "--scorers.judge.enabled", "false")
    assert code == 0 and "or by other scorers" in err, err  # as where the judge is gone
    assert not server.requests and (tmp_path / "unjudged" / "model.safetensors").is_file()


def test_a_preview_needs_no_judge(server, call, tmp_path):
    """Nothing is judged, so that nobody is asked, and no server need be named or be there."""
    words = judged_by(server, tmp_path / "s", key_variable=VARIABLE)
    assert call(*words, "--trials", "1", "--test-trials", "0")[0] == 0
    server.requests.clear()
    preview = ["show", "judged", "--study-dir", str(tmp_path / "s"), "--trial", "0", "--preview"]
    for more in ([], ["--scorers.judge.settings.endpoint", "http://127.0.0.1:9/v1"]):
        code, out, err = call(*preview, *more)
        assert code == 0 and "edited, trial 0" in out, err
        assert "endpoint" not in err and "was made with another" not in err
    assert not server.requests


def totals(lines):
    return [line for line in lines if line["event"] == "responses_judged"]


def slow_once(request, number):
    """The fourth request gets an error, as a server that is busy gives."""
    return (503, {}, {}) if number == 3 else answered(request)


def test_a_search_ends_with_what_its_judge_was_asked(server, call, events, tmp_path):
    """Two requests before the model is loaded, and those of saving, are in the sum."""
    server.script = slow_once
    words = judged_by(server, tmp_path / "s", retries=1, prompt_price=2, answer_price=10)
    code, lines = events(*words, "--pick", "knee", "--save", str(tmp_path / "out"))
    (judged,) = totals(lines)
    assert code == 0 and lines.index(judged) == len(lines) - 2  # before `ended`
    sent = len(server.requests)
    assert judged["scorer"] == "judge" and server.url in judged["by"]
    assert judged["requests"] == sent > 8 and judged["retries"] == 1 and judged["timeouts"] == 0
    assert judged["prompt_tokens"] == 100 * (sent - 1)
    assert judged["answer_tokens"] == 7 * (sent - 1)
    assert judged["cost"] == pytest.approx((200 + 70) * (sent - 1) / 1e6)
    server.script = lambda request, number: answered(request)
    server.requests.clear()
    code, _, err = call(*judged_by(server, tmp_path / "s", prompt_price=2), "--trials", "3")
    sent = len(server.requests)
    line = f"judge, all in all: {sent} requests, 0 retries, 0 timeouts, {100 * sent} + {7 * sent} "
    assert code == 0 and f"{line}tokens, cost {sent / 5000:.4g} (j at " in flat(err)
    (saved,) = [line["saved_scores"] for line in lines if line["event"] == "model_saved"]
    share = agreement_text(saved["judge"]["details"]["agreement"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- `judge` and the phrase rule say the same of {share} responses." in card
    assert re.fullmatch(r"\d/3 \(\d+%, \d+% to \d+%\)", share)


def test_a_worker_hands_its_sum_to_the_process_that_began_the_run(server, there, tmp_path):
    from heretic_kl.config import load_settings
    from heretic_kl.run import Session

    ours, theirs = [], []
    settings = load_settings(judged_by(server, tmp_path / "s"))
    with Session(settings, ours.append) as session:
        before = len(server.requests)
        with Session(settings, theirs.append, joins=True) as joined:
            joined.search(1)
        worker = len(server.requests) - before
        session.tell_judging()
    (at_worker,) = (e for e in theirs if isinstance(e, ResponsesJudged))
    (at_end,) = (e for e in ours if isinstance(e, ResponsesJudged))  # said once
    assert at_worker.requests == worker > 2
    assert at_end.requests == len(server.requests)


def test_what_was_asked_is_said_when_a_run_ends_by_an_error(server, events, tmp_path):
    words = judged_by(server, tmp_path / "s")
    code, lines = events(*words, "--trials", "1", "--pick", "max-judge=-1")
    assert code == 3 and [line["requests"] for line in totals(lines)] == [len(server.requests)]


def test_evaluate_asks_the_judge_and_says_how_it_agrees_with_the_phrases(
    server, call, events, there
):
    scorers = judged_by(server, there / "none")[6:]
    words = ["evaluate", "--model", "model", "--candidate", "model", *scorers]
    code, out, err = call(*words, "--json", "judged.json")
    assert code == 0, err
    document = json.loads((there / "judged.json").read_text())
    original, (copy,) = document["scores"]["judge"], document["candidates"]
    assert copy["scores"]["judge"] == original and original["details"]["classes"] == {"answered": 3}
    assert copy["minus_original"]["judge"]["mean"] == 0
    assert "judge on the test prompts" in out
    share = "3/3 (100%, 44% to 100%)"
    assert f"judge and the phrases agree on: original {share}, model {share}." in flat(out)
    assert f"judge, all in all: {len(server.requests)} requests, 0 retries" in err
    server.requests.clear()
    (judged,) = totals(events(*words)[1])
    assert judged["requests"] == len(server.requests) == 2 + 3  # equal responses are sent once
    assert judged["cost"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"key_variable": "NO_SUCH_KEY"},
            "key_variable = 'NO_SUCH_KEY': this environment variable",
        ),
        ({"endpoint": "localhost:1"}, "'localhost:1' is no address"),
        ({"endpoint": "http://127.0.0.1:9/v1"}, "does not judge: no connection"),
    ],
)
def test_a_mistake_is_one_line_before_the_model_is_loaded(
    server, there, tmp_path, capsys, settings, message
):
    code = cli.main(judged_by(server, tmp_path, **settings))
    captured = capsys.readouterr()
    assert code == 2 and "Loading" not in captured.err
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("heretic-kl: error:") and message in line


def test_a_server_that_rejects_the_key_says_so_without_it(server, there, tmp_path, capsys):
    server.script = lambda request, number: (401, {}, {"error": {"message": f"bad key {KEY}"}})
    assert cli.main(judged_by(server, tmp_path, key_variable=VARIABLE)) == 2
    error = capsys.readouterr().err
    assert "HTTP 401 (bad key ***): check key_variable" in error
    assert KEY not in error and KEY.encode() not in everything_in(tmp_path)


def test_a_server_that_is_gone_fails_trials_and_not_the_program(server, there, tmp_path, capsys):
    server.script = lambda request, number: (
        answered(request) if number < 8 else (503, {}, {"error": KEY})
    )
    code = cli.main(judged_by(server, tmp_path, key_variable=VARIABLE, concurrency=1))
    captured = capsys.readouterr()
    assert code == 1 and "not judged" in captured.err
    assert "Traceback" not in captured.err
    assert KEY not in captured.out + captured.err and KEY.encode() not in everything_in(tmp_path)
