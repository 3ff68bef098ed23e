"""Laws of every page: it fetches nothing, obeys nothing that it shows, and anyone can read it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import DARK, PHONE, Elements, loaded, violations
from study_samples import HOSTILE, make_run_file, make_study
from test_measurement_table import report as measured
from test_measurement_table import several
from test_study_report import report as study_report

from heretic_kl.report import measurement_page, render

pytest.importorskip("vl_convert")


def study_page(folder: Path) -> str:
    make_study(folder)
    make_run_file(folder)
    return render(study_report(folder).page())


def score_page() -> str:
    of = several(3)
    first, *others = of.candidates
    worst = replace(first, name=HOSTILE, verdict=HOSTILE)
    points = [
        {"name": name, "size": 90.0 * n, "bits": 4.0 * n, "kl": 0.4 / n, "low": 0.3 / n}
        | {"high": 0.5 / n, "pareto": n > 1, "text": name}
        for n, name in enumerate((HOSTILE, "Q4_0.gguf", "Q8_0.gguf"), start=1)
    ]
    shown = measured(worst, *others, reference=HOSTILE, inputs=(("prompts", HOSTILE),))
    return render(measurement_page(shown, points, {"4 bits": 0.2}))


@pytest.fixture(scope="module", params=["study", "score"])
def html(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each page with everything in it."""
    if request.param == "study":
        return study_page(tmp_path_factory.mktemp("studies"))
    return score_page()


def test_it_fetches_nothing_and_runs_its_own_script_alone(html: str) -> None:
    elements = Elements(html).elements
    for tag, attributes in elements:
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form"), tag
        assert not any(name.startswith("on") or name in ("src", "style") for name in attributes)
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (a["content"] for _, a in elements if "http-equiv" in a)
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert len(html.encode()) < 1_000_000


def test_hostile_text_stays_text(html: str) -> None:
    assert "<script>document.title" not in html and "<img" not in html
    assert html.count("&lt;script&gt;document.title") >= 3
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", html)
    assert "␀␛[31m[U+202E]" in html


def test_its_links_lead_somewhere(html: str) -> None:
    elements = Elements(html).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in elements if tag == "a" and a["href"]} <= set(ids)


def test_in_a_browser_it_runs_without_an_error(html: str, tmp_path: Path) -> None:
    shown, log = loaded(html, tmp_path)
    assert "<title>owned" not in shown and "<img" not in shown
    assert "CONSOLE" not in log


@pytest.mark.parametrize("flags", [(), (DARK,), (PHONE,)], ids=["light", "dark", "phone"])
def test_axe_finds_nothing_wrong(html: str, tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert violations(html, tmp_path, *flags) == []
