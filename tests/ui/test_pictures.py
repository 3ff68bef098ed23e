"""Pictures of the terminal in the documentation show what the program says now."""

import html
import re
from pathlib import Path

import pytest

from heretic_kl.ui.asking import keys_hint
from heretic_kl.ui.chat import HELP
from heretic_kl.ui.front_plot import MARKS

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
TEXT = re.compile(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>')


def shown(name):
    """What a picture shows, rows in their order, without blanks: lines are wrapped anywhere."""
    svg = (FIGURES / f"terminal-{name}.svg").read_text(encoding="utf-8")
    parts = sorted((float(y), float(x), text) for x, y, text in TEXT.findall(svg))
    return squeezed(html.unescape("".join(text for *_, text in parts)))


def squeezed(text):
    return "".join(text.split())


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("chat", [HELP]),
        ("compare", [keys_hint("back")]),
        ("list", [keys_hint("exit")]),
        ("live-dark", [mark.meaning for mark in MARKS]),
        ("live-light", [mark.meaning for mark in MARKS]),
        ("preview", [keys_hint("back")]),
    ],
)
def test_a_picture_shows_the_texts_of_the_program(name, texts):
    picture = shown(name)
    assert [text for text in texts if squeezed(text) not in picture] == []
