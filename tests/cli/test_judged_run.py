"""A search that a judge steers, from the command line; its key reaches the server alone."""

import pytest
from judging.chat_server import KEY, VARIABLE, answered, chat_server

from heretic_kl.cli import main as cli


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
