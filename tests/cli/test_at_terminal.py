"""From a search to a saved model in a real terminal, by Enter and arrow keys alone."""

import re
import sys

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals of POSIX", allow_module_level=True)

from pseudo_terminal import CTRL_C, DOWN, ENTER, UP, PseudoTerminal

SEARCH = ["-m", "heretic_kl", "--trials", "4", "--study-name", "pressed"]


def test_enter_and_arrow_keys_lead_from_a_search_to_a_saved_model(workplace):
    taken = [workplace / f"model-edited-trial-{number}" for number in range(4)]
    for folder in taken:
        folder.mkdir()
        (folder / "notes.txt").touch()
    with PseudoTerminal(SEARCH, workplace) as terminal:
        terminal.wait(r"^> Trial\?")
        terminal.press(DOWN + UP + ENTER)
        terminal.wait(r"^> Trial \d+:")
        terminal.press(ENTER)
        shown = terminal.wait(r"^> Folder: .* model-edited-trial-\d-2")
        assert "Tab completes" in shown
        terminal.press(ENTER)
        shown = terminal.wait(r"^saved merged model to (\S+)(.|\n)*^> Trial \d+:")
        terminal.press(UP + ENTER)
        terminal.wait(r"^saved (.|\n)*^> Trial\?")
        terminal.press(UP + ENTER)
        assert terminal.wait_for_end() == 0
    (name,) = re.findall(r"^saved merged model to (\S+)", shown, re.MULTILINE)
    assert (workplace / name / "model.safetensors").is_file()
    assert [[path.name for path in folder.iterdir()] for folder in taken] == [["notes.txt"]] * 4


def test_keys_typed_during_a_search_answer_no_menu(workplace):
    before = {path.name for path in workplace.iterdir()}
    with PseudoTerminal([*SEARCH[:-1], "ahead"], workplace) as terminal:
        terminal.wait("^Loading")
        terminal.press(ENTER * 5)
        terminal.wait(r"^> Trial\?")
        terminal.press(CTRL_C)
        assert terminal.wait_for_end() == 0
    assert not re.search(r"^> Trial \d|Folder:|^saved", terminal.shown, re.MULTILINE)
    assert {path.name for path in workplace.iterdir()} - before <= {"studies"}


def test_an_interrupted_search_leaves_the_terminal_as_it_was(workplace):
    words = [*SEARCH[:2], "--trials", "9999", "--study-name", "interrupted"]
    with PseudoTerminal(words, workplace) as terminal:
        assert terminal.echoes
        terminal.wait("trial 1 ")
        assert not terminal.echoes, "keys would stand amid the progress"
        terminal.press("typed" + ENTER + CTRL_C)
        assert terminal.wait_for_end() == 130
        assert terminal.echoes and "typed" not in terminal.shown
