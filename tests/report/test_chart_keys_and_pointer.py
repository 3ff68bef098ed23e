"""What a pointer and the keyboard do to the charts of a study's page, in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import answers
from study_samples import SCREENED
from test_pages import study_page

pytest.importorskip("vl_convert")
TOOLS = """
    const tip = document.getElementById("tip");
    const seen = () => tip.hidden ? null : tip.textContent;
    const link = (figure, trial) =>
        document.querySelector(`#figure-${figure} .chart a[href="#trial-${trial}"]`);
    const point = (target, type, at = {}) => target.dispatchEvent(
        new PointerEvent(type, {bubbles: true, clientX: 200, clientY: 200, ...at}));
    const key = (name) => document.dispatchEvent(new KeyboardEvent("keydown", {key: name}));
    const twins = () => [...document.querySelectorAll(".twin")].map(
        (twin) => [twin.closest("figure").id, twin.getAttribute("href")]);
"""


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return study_page(tmp_path_factory.mktemp("studies"))


def test_a_mark_that_is_pointed_at_says_its_values(html: str, tmp_path: Path) -> None:
    script = f"""{TOOLS}
        const mark = link("front", 12).querySelector("[aria-label]");
        point(mark, "pointermove");
        const told = [seen(), tip.getBoundingClientRect().bottom < 200];
        point(mark, "pointermove", {{clientX: innerWidth, clientY: 0}});
        const box = tip.getBoundingClientRect();
        told.push(box.top >= 0 && box.right <= innerWidth);
        point(document.body, "pointermove");
        told.push(seen());
        const start = document.querySelector("#figure-refined [aria-label^='Trial {SCREENED}:']");
        point(start, "pointermove");
        told.push(seen());
        return told;"""
    text, above, inside, away, start = answers(html, tmp_path, script)
    assert text == "Trial 12, refined, on the front: refusals 0/8 (0%), KL 0.0500 ± 0.0056"
    assert above and inside and away is None
    assert start == f"Trial {SCREENED}: refusals 34% predicted, KL 2.0000 ± 0.2222"


def test_a_hollow_mark_is_pointed_at_inside_and_says_that_it_is_predicted(
    html: str, tmp_path: Path
) -> None:
    script = f"""{TOOLS}
        const mark = link("front", {SCREENED}).querySelector("[aria-label]");
        mark.scrollIntoView({{block: "center", behavior: "instant"}});
        const box = mark.getBoundingClientRect();
        const hit = document.elementFromPoint(
            (box.left + box.right) / 2, (box.top + box.bottom) / 2);
        point(mark, "pointermove");
        return [hit === mark, seen()];"""
    hit, text = answers(html, tmp_path, script)
    assert hit
    assert text.startswith(f"Trial {SCREENED}, searched, predicted: refusals 34% predicted")


def test_the_keyboard_reaches_points_of_the_front_and_shows_their_values(
    html: str, tmp_path: Path
) -> None:
    script = f"""{TOOLS}
        const reached = link("front", 12);
        reached.focus();
        const told = [document.activeElement === reached, reached.tabIndex, seen(), twins()];
        key("Escape");
        told.push(seen());
        reached.blur();
        told.push(twins());
        reached.focus();
        reached.blur();
        return [...told, seen(), link("front", {SCREENED}).tabIndex];"""
    focused, index, text, lit, escaped, unlit, left, others = answers(html, tmp_path, script)
    assert focused and index == 0 and others == -1
    assert text == "Trial 12, refined, on the front: refusals 0/8 (0%), KL 0.0500 ± 0.0056"
    assert ["figure-front", "#trial-12"] in lit
    assert escaped is None and unlit == [] and left is None


def test_the_same_trial_is_highlighted_in_every_chart(html: str, tmp_path: Path) -> None:
    script = f"""{TOOLS}
        const mark = link("front", 3).querySelector("[aria-label]");
        point(mark, "pointerover");
        const lit = twins();
        const stroke = getComputedStyle(link("history", 3).querySelector("path")).strokeWidth;
        point(mark, "pointerout");
        return [lit, stroke, twins()];"""
    lit, stroke, unlit = answers(html, tmp_path, script)
    assert {figure for figure, _ in lit} == {"figure-front", "figure-history"}
    assert {target for _, target in lit} == {"#trial-3"} and len(lit) == 3  # two objectives
    assert stroke == "2.5px" and unlit == []
