"""A study that was made to write to a terminal, or HTML into a card, is listed, shown and saved."""

import json
import re
import shutil

import optuna
import pytest

from heretic_kl.search import open_storage, read_study

BAD = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\x9b31m<script>alert(1)</script>|`\n# [here](http://bad)"
NAME = f"kl{BAD}"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def hostile(value, names, key=""):
    """A value of a journal, JSON in texts too, with BAD behind whatever people see of it."""
    if isinstance(value, dict):
        return {names.get(k, k): hostile(inner, names, k) for k, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner, names) for inner in value]
    if isinstance(value, str) and value.startswith("{"):
        return json.dumps(hostile(json.loads(value), names))
    return value + BAD if key == "text" or "note_str" in key else value


@pytest.fixture
def made(searched, there):
    """(names of scorers and what replaces them) -> how a command names the hostile study."""

    def make(names):
        folder = there / "hostile"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        lines = (there / "studies" / "mine.journal").read_text(encoding="utf-8").splitlines()
        lines = [json.dumps(hostile(json.loads(line), names)) for line in lines]
        (folder / "mine.journal").write_text("\n".join(lines) + "\n", encoding="utf-8")
        with open_storage(None, folder, "mine") as storage:
            optuna.load_study(study_name="mine", storage=storage).add_trial(
                optuna.create_trial(
                    state=optuna.trial.TrialState.FAIL,
                    user_attrs={"error": f"failed{BAD}", "traceback": BAD},
                )
            )
        return ["mine", "--study-dir", "hostile"]

    return make


@pytest.mark.parametrize("names", [{}, {"teacher_forced_kl": NAME}], ids=["texts", "names"])
def test_nothing_in_a_study_reaches_the_terminal_as_a_command(made, call, names):
    study = made(names)
    for words in (
        ["trials", *study, "--all"],
        ["trials", *study, "--beside", "gone"],
        ["show", *study, "--trial", "2"],
        ["show", *study, "--trial", "2", "--compare", "1"],
    ):
        code, out, err = call(*words)
        assert code == int("gone" in words), err
        assert "<script>" in out or "--beside" in words or "--compare" in words
        assert CONTROLS.search(out + err) is None
        assert call(*words, "--json")[1].isascii()


def test_a_card_of_a_hostile_study_shows_its_texts_as_texts(made, call, there):
    (number, *_) = read_study("mine", there / "studies").tested
    code, out, err = call("save", *made({}), "--trial", str(number), "-o", "of_hostile")
    assert code == 0, err
    card = (there / "of_hostile" / "README.md").read_text(encoding="utf-8")
    log = (there / "hostile" / "mine.log").read_text(encoding="utf-8")
    assert CONTROLS.search(out + err + card + log) is None
    assert "<script" not in card and "\n# [here]" not in card and "](http" not in card
    (row,) = [line for line in card.splitlines() if line.startswith("| refusals |")]
    assert row.count("&lt;script&gt;alert(1)") == row.count("\\|\\` # [here]\\(http://bad)") == 2
    assert re.sub(r"\\.", "", row).count("|") == 5


def test_a_scorer_of_a_hostile_name_is_refused(made, call):
    code, _, err = call("save", *made({"teacher_forced_kl": NAME}), "--trial", "2", "-o", "never")
    assert code == 2 and "a scorer's name is" in err and CONTROLS.search(err) is None
