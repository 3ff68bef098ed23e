"""The documentation site builds without a warning, links lead somewhere, the reference is whole."""

import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from heretic_kl.cli.command import SUMMARIES
from heretic_kl.config import Settings
from heretic_kl.config.keys import leaves, spell_key

pytest.importorskip("furo")
ROOT = Path(__file__).parents[1]
DOCUMENTED = ("heretic_kl", "heretic_kl.score", "heretic_kl.scoring", "heretic_kl.kl")
DOCUMENTED += ("heretic_kl.integrations", "heretic_kl.testing")


class Page(HTMLParser):
    """What a page links to, loads, and can be linked to at."""

    def __init__(self, file):
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id"), values.get("name")}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif target := values.get("src") or (tag == "link" and values.get("href")):
            self.loads.append(target)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
        + [str(ROOT / "docs"), str(folder), "-d", str(tmp_path_factory.mktemp("doctrees"))],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {file: Page(file) for file in site.rglob("*.html") if "_static" not in file.parts}


def text_of(site, page):
    return re.sub(r"<[^>]+>", "", (site / page).read_text(encoding="utf-8"))


def test_there_is_a_page_for_every_document(site):
    documents = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert len(documents) > 40
    assert all((site / document.with_suffix(".html")).is_file() for document in documents)


def test_links_within_the_site_lead_somewhere(pages):
    checked = 0
    for file, page in pages.items():
        for target in page.links + page.loads:
            path, _, anchor = unquote(target).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            linked = (file.parent / path.partition("?")[0]).resolve() if path else file
            assert linked.is_file(), f"{file.name}: {target}"
            if anchor and linked in pages:
                assert anchor in pages[linked].anchors, f"{file.name}: {target}"
            checked += 1
    assert checked > 1000


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = {target for page in pages.values() for target in page.loads}
    assert loaded
    assert not [target for target in loaded if re.match(r"(https?:)?//", target)]


def test_results_and_examples_can_be_downloaded(site):
    downloads = {file.name for file in (site / "_downloads").rglob("*") if file.is_file()}
    assert {"peers.json", "keyword_rate.py", "hedging.toml", "config.default.toml"} <= downloads


def test_every_public_name_is_in_the_reference(pages):
    anchors = {anchor for file, page in pages.items() if file.parent.name == "api"
               for anchor in page.anchors if anchor}  # fmt: skip
    names = {anchor.rpartition(".")[2] for anchor in anchors}
    for module in DOCUMENTED:
        public = set(importlib.import_module(module).__all__) - {"__version__"}
        assert public <= names, module


def test_every_setting_and_command_is_in_the_reference(site, pages):
    keys = {spell_key(path) for path, _ in leaves(Settings) if path[0] != "prompts"}
    keys |= {f"prompts.KIND.USE.{key}" for key in ("source", "column", "limit")}
    text = text_of(site, "every-setting.html")
    assert not {key for key in keys if key not in text}
    anchors = {f"setting-{re.sub('[._]', '-', key).lower()}" for key in keys}
    assert anchors <= pages[site / "every-setting.html"].anchors
    flags = text_of(site, "every-flag.html")
    assert all(f"usage: heretic-kl {name}" in flags for name in SUMMARIES if name != "optimize")


def test_formulas_are_drawn_by_the_browser(site):
    method = (site / "method.html").read_text(encoding="utf-8")
    assert method.count("<math ") > 30
    assert "<mfrac>" in method and "$" not in text_of(site, "method.html")
