"""What is maximized, a third objective, judges beside phrases and two KLs, in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import PHONE, violations
from study_samples import BASELINE, SCREENED, kl, make_run_file, make_study, refusals
from test_pages import evaluation
from test_study_report import named, notes, report

from heretic_kl.config import Settings, read_settings
from heretic_kl.report import Page, pictures, render
from heretic_kl.report.planes import objective_titles, planes_of
from heretic_kl.report.run_data import verdicts
from heretic_kl.scoring import Score
from heretic_kl.search import StoredStudy, TrialRecord, read_study

EXAMPLES = Path(__file__).parents[2] / "examples"
ROLES: Any = {
    "refusals": "minimize",
    "kept_refusals": "maximize",
    "teacher_forced_kl": "minimize",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    make_study(folder)
    make_run_file(folder)
    return folder


def keeping(record: TrialRecord) -> TrialRecord:
    """The trial with a third objective, which is maximized: trial 12 keeps least."""
    if record.state == "screened":
        return record
    refused, cost = record.scores.values()
    kept = refusals(2 if record.number == 12 else 6)
    scores = {"refusals": refused, "kept_refusals": kept, "teacher_forced_kl": cost}
    first, last = record.objectives
    return replace(record, scores=scores, objectives=(first, -(kept.value or 0), last))


@pytest.fixture(scope="module")
def study(folder: Path) -> StoredStudy:
    study = read_study("s", folder)
    baseline = {**BASELINE, "kept_refusals": refusals(7)}
    records = tuple(map(keeping, study.records))
    return replace(study, roles=ROLES, records=records, baseline=baseline)


@pytest.fixture(scope="module")
def page(folder: Path, study: StoredStudy) -> Page:
    return report(folder, study=study, importances=[]).page()


def test_damage_is_across_and_every_other_objective_has_its_front(page: Page) -> None:
    first, second = named(page, "front"), named(page, "front-2")
    assert first.title == "Pareto front: refusals" and "lower left is better" in first.caption
    assert second.title == "Pareto front: kept refusals"
    assert second.caption.startswith("kept refusals (share) against KL (nats) of every")
    assert "upper left is better" in second.caption and "lower" not in second.caption
    assert "front is that of all 3 objectives" in second.caption
    assert "Objectives that are not drawn" not in notes(page)
    at = {row["trial"]: row for row in second.rows}
    assert (at[12]["x"], at[12]["y"]) == (0.05, 0.25) and at[13]["y"] == 0.75
    assert SCREENED not in at  # nothing predicts what it keeps
    drawn = [layer["mark"].get("type") for layer in second.spec["layer"] if "mark" in layer]
    assert "line" not in drawn  # points of the front of three objectives are no line here
    refined = named(page, "refined-2")
    assert "upper left is better" in refined.caption
    assert "kept refusals (share) 6/8 (75%) before, 2/8 (25%) after" in refined.summary


def test_the_best_of_what_is_maximized_is_the_highest(page: Page) -> None:
    figure = named(page, "history")
    kept = [row for row in figure.rows if row["score"] == "kept refusals (share)"]
    assert kept[-1]["best"] == 0.75 and {row["value"] for row in kept} == {0.25, 0.75}
    assert "Higher is better for kept refusals (share)." in figure.caption


def test_names_and_titles_of_figures_differ_and_all_fronts_are_pictures(page: Page) -> None:
    for values in ([f.name for f in page.figures], [f.title for f in page.figures]):
        assert len(values) == len(set(values))
    names = [figure.name for figure in pictures(page)]
    assert {"front", "front-2", "refined", "refined-2"} <= set(names)
    render(page)


def test_the_configuration_for_over_refusal_has_kl_across() -> None:
    words = ["--config", str(EXAMPLES / "over_refusal.toml"), "--model", "m"]
    tables = read_settings(Settings, words).scorers.items()
    roles: Any = {n: t.role for n, t in tables if t.enabled and t.role != "monitor"}
    measured = {"teacher_forced_kl": kl(0.1), "refusals": refusals(1), "kept_refusals": refusals(6)}
    planes = planes_of(roles, objective_titles(roles, measured))
    assert [(plane.x, plane.y, plane.better) for plane in planes] == [
        ("teacher_forced_kl", "refusals", "lower left"),
        ("teacher_forced_kl", "kept_refusals", "upper left"),
    ]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"a": "minimize"}, []),
        ({"a": "maximize", "b": "minimize"}, [("b", "a", "upper left")]),
        ({"kl": "minimize", "b": "maximize"}, [("kl", "b", "upper left")]),
        ({"a": "minimize", "b": "maximize"}, [("b", "a", "lower right")]),
    ],
)
def test_which_way_is_better_follows_the_roles(roles: Any, expected: list[Any]) -> None:
    titles = {"a": "a", "b": "b", "kl": "KL (nats)"}
    planes = planes_of(roles, titles)
    assert [(plane.x, plane.y, plane.better) for plane in planes] == expected


def test_pages_about_other_models_follow_the_roles() -> None:
    more = {"kept": refusals(6)}
    of = evaluation()
    for candidate in of.candidates:
        candidate.scores.update(more)
    roles = {"refusals": "minimize", "kept": "maximize", "teacher_forced_kl": "minimize"}
    page = evaluation(roles=roles, scores={**of.scores, **more}, candidates=of.candidates).page()
    assert "lower left is better" in named(page, "front").caption
    assert "upper left is better" in named(page, "front-2").caption
    assert named(page, "front-2").rows[1]["y"] == 0.75


def judged(*verdicts: str) -> Score:
    return Score(0.5, "2/4", details={"counted": [0, 1], "verdicts": list(verdicts)})


@pytest.fixture(scope="module")
def judged_page(folder: Path, study: StoredStudy) -> Page:
    """Three objectives, a judge beside the phrases, and two KLs."""
    answers = ("answered", "refusal", "evasion", "degenerate", "not judged", "answered")
    judge = judged(*answers, "refusal", "degenerate")
    assert study.test_baseline is not None
    scorers = {"judge": {"use": None, "settings": {}}, "refusals": {"use": "refusals"}}
    changed = replace(
        study,
        test_baseline={"judge": judge, **study.test_baseline},
        tested={12: {**study.tested[12], "judge": judge, "code_kl": kl(0.4)}},
        settings={**study.settings, "scorers": scorers},
    )
    return report(folder, study=changed, importances=[]).page()


@pytest.mark.parametrize("flags", [(), (PHONE,)], ids=["wide", "phone"])
def test_axe_finds_nothing_wrong(judged_page: Page, tmp_path: Path, flags: tuple[str, ...]) -> None:
    assert violations(render(judged_page), tmp_path, *flags) == []


def test_judge_and_phrases_stand_side_by_side_and_contradictions_are_marked(
    judged_page: Page,
) -> None:
    (section,) = (section for section in judged_page.sections if section.name == "verdicts")
    (shown,) = section.tables
    assert shown.title == "refusals and judge: test prompts"
    assert shown.headings[:3] == ("prompt", "original: refusals", "original: judge")
    assert shown.headings[3:5] == ("trial 12: refusals", "trial 12: judge")
    refused, by_judge = ([row[column] for row in shown.rows] for column in (1, 2))
    assert refused == ["refused"] * 7 + ["degenerate (loop)"]
    assert by_judge == [
        *("≠ answered", "refusal", "evasion", "degenerate", "not judged", "≠ answered"),
        *("refusal", "degenerate"),
    ]
    after_judge = [row[4] for row in shown.rows]
    assert after_judge[:3] == ["answered", "≠ refusal", "≠ evasion"]
    (note,) = section.notes
    assert "contradicts refusals" in note
    assert "original: judge 2, trial 12: judge 3 of 8 prompts" in note
    assert "≠ answered" in render(judged_page)


def test_a_judge_of_other_prompts_has_a_table_of_its_own() -> None:
    scorers = {"mine": {"use": "judge", "settings": {"prompts": "borderline"}}}
    scores = {"original": {"refusals": refusals(1, 2), "mine": judged("refusal", "answered")}}
    prompts = {"harmful": ["a", "b"], "borderline": ["c", "d"]}
    phrases, judge = verdicts(prompts, scorers, scores)
    assert (phrases.prompts, judge.prompts) == (("a", "b"), ("c", "d"))
    assert judge.columns == {"original": ["refusal", "answered"]} and not judge.contradictions
    assert verdicts({"harmful": ["a"]}, {}, {"o": {"judge": judged("x", "y")}}) == []


def test_two_kls_have_lines_of_their_own(folder: Path, judged_page: Page) -> None:
    figure = named(judged_page, "positions")
    lines = {(row["score"], row["model"]) for row in figure.rows}
    assert {("KL", "trial 12"), ("code kl", "trial 12")} <= lines
    assert figure.columns["score"] == "score"
    assert "trial 12, code kl: 0.4 nats at position 1, 0.1333 at position 3." in figure.summary
    assert "trial 12, KL: 0.05 nats at position 1" in figure.summary
    assert ">code kl</text>" in render(judged_page)
    (alone,) = (f for f in report(folder).page().figures if f.name == "positions")
    assert "score" not in alone.columns and "trial 12: 0.05 nats" in alone.summary
