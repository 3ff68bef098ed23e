"""Keys that are typed before they are asked for, in a real terminal."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals of POSIX", allow_module_level=True)

from pseudo_terminal import CTRL_C, DOWN, ENTER, LEFT, UP, PseudoTerminal

MENUS = f"""
import sys, time
from pathlib import Path

sys.path.insert(0, {str(Path(__file__).parent)!r})
from ui_samples import FakeSession, trial
from heretic_kl.ui.picker import Picker
from heretic_kl.ui.terminal import make_console

session = FakeSession(trial(0, 10, 0.02))

def wait():
    while not Path("go").exists():
        time.sleep(0.01)
    Path("go").unlink()

def response(number):
    yield "beginning "
    if number is None:
        wait()
    yield "end"

def save_at_length(*words, **options):
    print("saving", flush=True)
    wait()
    return save(*words, **options)

session.response = response
save = session.save
session.save = save_at_length
Picker(session, make_console(), default_folder=lambda record: Path("out")).run()
print("asked", [said[-1] for number, said in session.asked if number is None])
print("saves", len(session.saves))
"""
TALK = DOWN * 3 + ENTER


@pytest.fixture
def menus(tmp_path: Path) -> Iterator[PseudoTerminal]:
    (tmp_path / "menus.py").write_text(MENUS, encoding="utf-8")
    with PseudoTerminal(["menus.py"], tmp_path) as terminal:
        terminal.wait(r"^> Trial\?")
        terminal.press(ENTER)
        terminal.wait("^> Trial 0:")
        yield terminal


def test_lines_typed_during_a_response_come_next(menus: PseudoTerminal, tmp_path: Path) -> None:
    menus.press(TALK)
    menus.wait("^you >")
    menus.press("one" + ENTER)
    menus.wait("^beginning")
    assert not menus.echoes
    menus.press("two" + ENTER + "thr")
    (tmp_path / "go").touch()
    menus.wait(r"^you > two\n(.*\n)+beginning")
    (tmp_path / "go").touch()
    menus.wait("^you > thr$")
    menus.press("ee" + ENTER)
    menus.wait(r"^you > three\n(.*\n)+beginning")
    (tmp_path / "go").touch()
    menus.wait(r"^you > three\n(.*\n)+you >$")
    menus.press("/exit" + ENTER)
    shown = menus.wait("/exit(.|\n)*^> Trial 0:")
    lines = [line for line in shown.splitlines() if "two" in line or "three" in line]
    assert lines == ["you > two", "you > three"], "shown once, in order"
    menus.press(CTRL_C)
    menus.wait(r"/exit(.|\n)*^> Trial\?")
    menus.press(CTRL_C)
    assert menus.wait_for_end() == 0
    assert "asked ['one', 'two', 'three']" in menus.shown
    assert menus.echoes, "as before"


def test_ctrl_c_stops_the_responses_and_what_was_typed(
    menus: PseudoTerminal, tmp_path: Path
) -> None:
    menus.press(TALK)
    menus.wait("^you >")
    menus.press("one" + ENTER)
    menus.wait("^beginning")
    menus.press("two" + ENTER + "three" + ENTER)
    (tmp_path / "go").touch()
    menus.wait(r"^you > two\n(.*\n)+beginning")
    menus.press(CTRL_C)
    menus.wait(r"^\(stopped\)(.|\n)*^you >$")
    menus.press("four" + ENTER)
    menus.wait(r"^you > four\n(.*\n)+beginning")
    (tmp_path / "go").touch()
    menus.wait(r"^you > four\n(.*\n)+you >$")
    menus.press("/exit" + ENTER)
    menus.wait("/exit(.|\n)*^> Trial 0:")
    menus.press(LEFT + CTRL_C)
    assert menus.wait_for_end() == 0
    assert "asked ['one', 'two', 'four']" in menus.shown


def test_keys_typed_during_a_save_do_not_save_again(menus: PseudoTerminal, tmp_path: Path) -> None:
    menus.press(ENTER * 2)
    menus.wait("^saving")
    menus.press(ENTER * 2)
    (tmp_path / "go").touch()
    menus.wait("^saving(.|\n)*^> Trial 0:")
    menus.press(LEFT)
    menus.wait(r"^saving(.|\n)*^> Trial\?")
    menus.press(UP + ENTER)  # around the list, to the entry `exit`
    assert menus.wait_for_end() == 0
    assert "saves 1" in menus.shown
