"""A scorer from the template keeps every law; what breaks one is named."""

import pytest

from heretic_kl.cli import main as cli


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_new_scorer_keeps_every_law(tmp_path, capsys):
    assert cli.main(["scorer", "new", "mine.py"]) == 0
    assert '[scorers.mine]\nuse = "mine.py"' in capsys.readouterr().out
    assert cli.main(["scorer", "test", "mine.py", "--settings", '{"word": "flour"}']) == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 10 and "BROKEN" not in out
    assert cli.main(["scorer", "new", "mine.py"]) == 1  # never written over
    assert "File exists" in capsys.readouterr().err


def test_a_broken_law_is_named(tmp_path, capsys):
    cli.main(["scorer", "new", "mine.py"])
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "broken.py").write_text(text.replace('text=f"{share:.0%}"', 'text=""'))
    capsys.readouterr()
    assert cli.main(["scorer", "test", "broken.py"]) == 1
    out, err = capsys.readouterr()
    assert "BROKEN  scores are finite" in out and "a score needs a text for people" in out
    assert "scorer 'broken.py' breaks 2 of 10 laws" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "say what to do with which file"),
        (["new", "mine.txt"], 2, "does not end in .py"),
        (["try", "mine.py"], 2, "action must be one of new, test"),
        (["test", "refusals", "--settings", "[]"], 2, "--settings must be a JSON object"),
        (["test", "refusals", "--settings", '{"x": 1}'], 2, "unknown setting scorers.tested"),
        (["test", "gone.py"], 1, "no such file 'gone.py'"),
    ],
)
def test_mistakes_are_one_line(words, code, message, capsys):
    assert cli.main(["scorer", *words]) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
