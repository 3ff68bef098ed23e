"""What a user can get wrong ends in one clear line and an exit code, never in a traceback."""

import os
import sys

import pytest

from heretic_kl.cli import main as cli
from heretic_kl.testing import save_tiny_model, tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny_model(folder, tiny_llama())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("HERETIC_KL_")]:
        monkeypatch.delenv(name)
    return tmp_path


def arguments(model, *more):
    words = ["--model", str(model), "--device", "cpu", "--trials", "1", "--prompt-set", "builtin"]
    words += ["--no-refine", "--no-directions.by-response"]  # a tiny model refuses nothing
    limits = [
        word
        for kind in ("harmful", "harmless")
        for split in ("train", "validation", "test")
        for word in (f"--prompts.{kind}.{split}.limit", "2")
    ]
    return [*words, *limits, "--max-response-tokens", "3", "--batch-size", "4", *more]


def one_line(capsys, code, expected_code=1):
    captured = capsys.readouterr()
    assert code == expected_code, captured.err
    errors = [line for line in captured.err.splitlines() if line.startswith("heretic-kl: error:")]
    assert len(errors) == 1, captured.err
    assert "Traceback" not in captured.err + captured.out
    return errors[0]


def before_loading(capsys, code):
    """The error of a wrong setting that shows before the model is loaded."""
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Loading" not in captured.err
    (line,) = captured.err.strip().splitlines()
    return line


def test_a_missing_model(here, capsys):
    code = cli.main(["--model", "./no/such/model", "--prompt-set", "builtin"])
    assert "no model at './no/such/model'" in one_line(capsys, code)


def test_a_model_without_chat_template_is_prompted_with_plain_text(here, capsys, tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("bare") / "bare", tiny_llama())
    (folder / "chat_template.jinja").unlink()
    assert cli.main(arguments(folder)) == 0
    assert "no chat template: it is prompted with plain text" in capsys.readouterr().err
    assert cli.main(arguments(folder, "--chat-template", "none")) == 0
    assert "no chat template" not in capsys.readouterr().err


def test_an_unknown_scorer(here, capsys, model):
    code = cli.main(arguments(model, "--scorers.mine.use", "refusal"))
    assert "did you mean 'refusals'" in before_loading(capsys, code)


def test_an_unknown_scorer_setting(here, capsys, model):
    code = cli.main(arguments(model, "--scorers.refusals.settings.marker", '["no"]'))
    assert "did you mean 'markers'" in one_line(capsys, code, 2)


def test_an_empty_prompt_file(here, capsys, model):
    (here / "empty.txt").write_text("\n\n")
    code = cli.main(arguments(model, "--prompts.harmful.train.source", "empty.txt"))
    assert "holds no prompts" in before_loading(capsys, code)


def test_an_unknown_column(here, capsys, model):
    (here / "p.csv").write_text("question,answer\na,b\nc,d\n")
    more = ["--prompts.harmful.train.source", "p.csv", "--prompts.harmful.train.column", "text"]
    line = before_loading(capsys, cli.main(arguments(model, *more)))
    assert "no column 'text'" in line and "question" in line


def test_an_unknown_setting(here, capsys, model):
    code = cli.main(arguments(model, "--kl-token", "3"))
    assert "--kl-tokens" in one_line(capsys, code, 2)


def test_a_bad_pick_rule_shows_before_anything_runs(here, capsys, model):
    code = cli.main(arguments(model, "--pick", "best"))
    assert "unknown pick rule 'best'" in before_loading(capsys, code)


def test_save_needs_a_pick_without_a_terminal_where_refusals_are_not_counted(here, capsys, model):
    words = arguments(model, "--save", "out", "--scorers.refusals.enabled", "false")
    assert "--pick" in one_line(capsys, cli.main(words), 2)


def test_a_full_disk_on_save_keeps_the_study(here, capsys, model, monkeypatch):
    import shutil

    usage = shutil.disk_usage(here)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10))
    code = cli.main(arguments(model, "--pick", "trial=0", "--save", "out"))
    assert "out" in one_line(capsys, code)
    assert not (here / "out").exists()
    assert list((here / "studies").glob("*.journal"))
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert cli.main(arguments(model, "--pick", "trial=0", "--save", "out")) == 0
    assert (here / "out" / "model.safetensors").is_file()


def test_an_unreadable_storage(here, capsys, model):
    code = cli.main(arguments(model, "--storage", "sqlite:////no/such/folder/x.db"))
    assert "cannot open storage" in before_loading(capsys, code)


def test_a_study_folder_that_cannot_be_written(here, capsys, model):
    (here / "file").write_text("x")
    code = cli.main(arguments(model, "--study-dir", "file/studies"))
    assert "cannot write studies" in before_loading(capsys, code)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX paths")
def test_no_writable_cache_for_the_demo_model(here, capsys, monkeypatch):
    (here / "file").write_text("x")
    monkeypatch.setenv("HERETIC_KL_CACHE", str(here / "file" / "cache"))
    line = one_line(capsys, cli.main(["demo"]))
    assert "cache" in line


def test_the_command_runs_quietly_to_the_end(here, capsys, model):
    code = cli.main(arguments(model, "--quiet", "--pick", "trial=0", "--save", "out"))
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "saved merged model to out" in captured.out
    assert "trial 0" in captured.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scorers.teacher_forced_kl.settings.test_prompts", '{"source": "gone.txt"}'], "gone"),
        (
            ["--scorers.teacher_forced_kl.settings.prompts"]
            + ['{"source": "builtin:harmless", "split": "nowhere"}'],
            "no split 'nowhere'",
        ),
        (["--prompts.harmless.test.split", "nowhere"], "no split 'nowhere'"),
        (["--storage", "foo://x"], "unknown scheme 'foo'"),
        (["--storage", "mysql://u:pw@h/db"], "pip install 'mysqlclient'"),
        (["--pick", "best"], "unknown pick rule 'best'"),
    ],
)
def test_wrong_settings_show_before_a_model_is_loaded(here, capsys, monkeypatch, words, expected):
    monkeypatch.setitem(sys.modules, "MySQLdb", None)
    # There is no such model: the error about it would come first if it were looked for first.
    line = one_line(capsys, cli.main(arguments("./no/such/model", *words)), 2)
    assert expected in line and "pw" not in line
