"""What a page is made of, and what headless Chromium and axe say of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

NAMES = (os.environ.get("CHROMIUM") or "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
"""The variable's, or else the first one that is installed."""
DARK = "--blink-settings=preferredColorScheme=0"
PHONE = "--window-size=390,844"


class Elements(HTMLParser):
    """Every element with its attributes; text is collected apart from scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside not in ("script", "style"):
            self.text.append(data)


def loaded(html: str, folder: Path, fragment: str = "", *flags: str) -> tuple[str, str]:
    """The page as headless Chromium has it once its scripts are through, and its log."""
    return _run(html, folder, fragment, "--virtual-time-budget=20000", "--dump-dom", *flags)


def printed(html: str, folder: Path, *flags: str) -> tuple[dict[str, Any], int]:
    """What the page looks like on its way to a PDF, and how many pages it has.

    Colours of the body, display of the navigation, sizes of charts and of tables that stand in
    no figure, and texts of details that are closed.
    """
    listen = """<script>matchMedia("print").addEventListener("change", ({matches}) => {
        const style = (name) => getComputedStyle(document.querySelector(name));
        const all = (name) => [...document.querySelectorAll(name)];
        const size = (e) => [e.getBoundingClientRect().width, e.getBoundingClientRect().height];
        if (matches) console.log("PRINTED " + encodeURIComponent(JSON.stringify({
            page: style("body").backgroundColor, text: style("body").color,
            nav: style("nav").display, charts: all(".chart svg").map(size),
            tables: all("section table").filter((e) => !e.closest("figure, .trial")).map(size),
            closed: all("details:not([open], .trial)").map((e) => e.textContent)})) + " END");
        });</script></body>"""
    checked = listen.join(_without_policy(html).rsplit("</body>", 1))
    target = folder / "p.pdf"
    _, log = _run(checked, folder, "", f"--print-to-pdf={target}", *flags)
    told = json.loads(unquote(re.findall(r"PRINTED (\S+) END", log)[0]))
    return told, len(re.findall(rb"/Type\s*/Page\b", target.read_bytes()))


def _run(html: str, folder: Path, fragment: str, *flags: str) -> tuple[str, str]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed; the variable CHROMIUM names another one")
    path = folder / "r.html"
    path.write_text(html, encoding="utf-8")
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'u'}"]
    command = [CHROMIUM, *fixed, "--enable-logging=stderr", *flags, f"file://{path}{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout, done.stderr


def _without_policy(html: str) -> str:
    """A page that also runs scripts that are not its own."""
    return re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)


def answers(html: str, folder: Path, script: str) -> Any:
    """What a function's body in JavaScript returns in the page, JSON-ready."""
    say = f"""document.documentElement.dataset.told =
        encodeURIComponent(JSON.stringify((() => {{ {script} }})()));"""
    parts = _without_policy(html).rpartition("</body>")
    shown, log = loaded(f"{parts[0]}<script>{say}</script></body></html>", folder)
    told = re.findall(r'<html[^>]* data-told="([^"]*)"', shown)
    assert told, log
    return json.loads(unquote(told[0]))


def violations(html: str, folder: Path, *flags: str) -> list[list[object]]:
    """What axe finds wrong, and how far the page is wider than the window, in pixels."""
    package = find_spec("axe_core_python")
    if package is None or package.origin is None:
        pytest.skip("axe-core-python is not installed")
    axe = (Path(package.origin).parent / "axe.min.js").read_text("utf-8")
    say = """axe.run(document, {resultTypes: ["violations"]}).then((result) => {
        const all = result.violations.map((v) => [v.id, v.nodes.length, v.nodes[0].html]);
        const wider = document.documentElement.scrollWidth - innerWidth;
        if (wider > 0) all.push(["wider than the window", wider, ""]);
        document.documentElement.dataset.axe = encodeURIComponent(JSON.stringify(all));
        document.documentElement.dataset.passes = result.passes.length; });"""
    parts = _without_policy(html).rpartition("</body>")
    checked = f"{parts[0]}<script>{axe}</script><script>{say}</script></body></html>"
    tag = re.findall(r"<html[^>]*>", loaded(checked, folder, "", *flags)[0])[0]
    assert int(re.findall(r'data-passes="(\d+)"', tag)[0]) > 20
    return list(json.loads(unquote(re.findall(r'data-axe="([^"]*)"', tag)[0])))
