"""Laws of every page: it fetches nothing, obeys nothing that it shows, and anyone can read it."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from browser import DARK, PHONE, Elements, loaded, printed, violations
from study_samples import HOSTILE, kl, make_run_file, make_study, refusals
from test_measurement_table import report as measured
from test_measurement_table import several
from test_study_report import report as study_report

from heretic_kl.report import EvaluationReport, distinct, measurement_page, render
from heretic_kl.report.pages.evaluation import trade_off_rows
from heretic_kl.report.planes import planes_of
from heretic_kl.scoring import Score, paired_difference

pytest.importorskip("vl_convert")
NAMES = ("./edit", "org/other", HOSTILE)
ROLES = {"refusals": "minimize", "teacher_forced_kl": "minimize"}


def evaluation(**changes: Any) -> EvaluationReport:
    """Three candidates; whatever a model or user names is hostile somewhere."""
    original = {"refusals": refusals(7), "teacher_forced_kl": kl(0.0), "odd": Score(0.5, HOSTILE)}
    candidates = [
        SimpleNamespace(
            name=name,
            scores={
                "refusals": refusals(count),
                "teacher_forced_kl": kl(mean),
                "odd": Score(None, HOSTILE),
            },
            minus_original={"refusals": paired_difference([0.0, 1.0], [1.0, 1.0])},
            minus_first={} if place == 0 else {"refusals": paired_difference([0.0], [1.0])},
            responses={"harmless": ["It is 4.", HOSTILE], "harmful": [f"VERY BAD {HOSTILE}"]},
        )
        for place, (name, count, mean) in enumerate(
            zip(NAMES, (1, 2, 0), (0.1, 0.2, 0.3), strict=True)
        )
    ]
    prompts = {"harmful": [f"bad {i} {HOSTILE}" for i in range(8)], "harmless": ["2+2?", HOSTILE]}
    made: dict[str, Any] = {
        "original": HOSTILE,
        "use": "test",
        "roles": ROLES,
        "scores": original,
        "candidates": candidates,
        "prompts": prompts,
        "responses": {"harmless": ["It is four.", HOSTILE], "harmful": ["I cannot."]},
        "facts": {
            "versions": {"torch": HOSTILE},
            "machine": "Linux",
            "calibration": {"dtype": "float32"},
            "prompts": [
                {"kind": "harmful", "use": "test", "source": HOSTILE, "count": 8, "sha256": "ab"}
            ],
        },
        "settings": {"model": HOSTILE, "scorers": {}},
        "command": f"heretic-kl {HOSTILE}",
    }
    return EvaluationReport(**{**made, **changes})


def evaluation_page(**changes: Any) -> str:
    return render(evaluation(**changes).page())


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


@pytest.fixture(scope="module", params=["study", "evaluate", "score"])
def html(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each page with everything in it."""
    if request.param == "study":
        return study_page(tmp_path_factory.mktemp("studies"))
    return evaluation_page(harmful=True) if request.param == "evaluate" else score_page()


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


@pytest.mark.parametrize("flags", [(), (DARK,)], ids=["light", "dark"])
def test_printed_it_is_black_on_white_with_all_charts_and_tables(
    html: str, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    told, pages = printed(html, tmp_path, *flags)
    assert (told["page"], told["text"]) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    assert told["nav"] == "none" and told["closed"] == [] and pages >= 1
    elements = Elements(html).elements
    assert len(told["charts"]) == sum(a.get("class") == "chart" for _, a in elements) >= 1
    assert len(told["tables"]) >= 1
    for width, height in (*told["charts"], *told["tables"]):
        assert width > 50 and height > 10


class TestEvaluation:
    def test_everything_of_every_candidate_is_shown(self) -> None:
        page = evaluation().page()
        assert [f.name for f in page.figures] == ["comparison", "front", "positions"]
        (result, *_) = page.sections
        refused, kls, odd = result.tables
        assert refused.headings == ("model", "score", "minus original", "minus the first")
        assert [row[0] for row in refused.rows] == ["original", *NAMES]
        assert refused.rows[1][2] == "-0.5 (-1 to +0) *" and refused.rows[1][3] == "–"
        assert refused.rows[2][3] == "-1 *" and kls.rows[1][1] == "0.1000 ± 0.0111 nats"
        assert odd.rows[1][1] == HOSTILE
        (figures,) = (section for section in page.sections if section.name == "figures")
        assert [entry.name for entry in figures.entries] == ["original", *NAMES]

    def test_responses_to_harmful_prompts_are_shown_on_request_alone(self) -> None:
        text = "".join(Elements(evaluation_page()).text)
        assert "VERY BAD" not in text and "It is four." in text
        assert "Responses to 1 harmful prompts are left out" in text
        assert "VERY BAD" in evaluation_page(harmful=True)
        page = evaluation().page()
        (section,) = (section for section in page.sections if section.name == "verdicts")
        (table,) = section.tables
        assert table.headings == ("prompt", "original", *NAMES)
        assert [row[2] for row in table.rows] == ["refused", *["not"] * 6, "degenerate (loop)"]

    def test_what_is_missing_is_said(self) -> None:
        text = evaluation_page(roles={"odd": "minimize"}, responses={}, prompts={})
        assert "There is one objective: no trade-off." in text
        assert "No responses: --keep-responses none." in text
        assert "no scorer counts refusals" in text
        bare = {"odd": Score(0.5, "half")}
        candidates = [
            SimpleNamespace(**{**vars(c), "scores": bare}) for c in evaluation().candidates
        ]
        text = evaluation_page(scores=bare, candidates=candidates)
        assert "no scorer has a profile" in text and "refusals and KL: no values" in text

    def test_the_front_minds_what_is_maximized(self) -> None:
        scores = {
            name: {"kept": Score(kept, ""), "kl": Score(cost, "")}
            for name, kept, cost in (("a", 0.9, 0.0), ("b", 0.5, 0.1), ("c", 1.0, 0.2))
        }
        anchors = dict.fromkeys(scores, "x")
        for role, expected in (("maximize", {"a", "c"}), ("minimize", {"a", "b"})):
            roles: dict[str, Any] = {"kept": role, "kl": "minimize"}
            (plane,) = planes_of(roles, {"kept": "kept", "kl": "KL (nats)"})
            rows = trade_off_rows(scores, plane, anchors)
            assert {row["model"] for row in rows if row["front"]} == expected
        assert rows[0]["x_low"] == rows[0]["x_high"] == 0.0

    def test_names_that_repeat_are_numbered(self) -> None:
        assert distinct(["a", "a", "original", "a"]) == ["a", "a (2)", "original (2)", "a (3)"]
