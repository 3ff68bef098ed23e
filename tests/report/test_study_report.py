"""The report of a study: nothing is left out, nothing that a model says is obeyed or fetched."""

from __future__ import annotations

import hashlib
import re
import sys
import webbrowser
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from browser import Elements, loaded
from study_samples import LAYERS, SCREENED, make_study, refusals

from heretic_kl.cli.main import main
from heretic_kl.errors import SelectionError, StudyError
from heretic_kl.report import Page, StudyReport, pictures, png, render
from heretic_kl.report.drawing import COLOURS
from heretic_kl.report.figures import Figure, history_figure
from heretic_kl.report.run_data import verdicts, visible
from heretic_kl.report.study_data import choose, history_rows, strength_rows
from heretic_kl.search import PlanStore, RunFile, importances, read_study

pytest.importorskip("vl_convert")


def report(folder: Path, **changes: object) -> StudyReport:
    study = read_study("s", folder)
    parts = {
        "study": study,
        "run": RunFile(folder, "s").read(),
        "plans": PlanStore(folder, "s"),
        "importances": importances(study.trials, len(study.roles)),
        "settings": study.settings,
    }
    return StudyReport(**{**parts, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def page(studies: Path) -> Page:
    return report(studies).page()


@pytest.fixture(scope="module")
def html(page: Page) -> str:
    return render(page)


def notes(page: Page) -> str:
    return "\n".join(note for section in page.sections for note in section.notes)


def test_everything_that_was_recorded_is_a_figure(page: Page) -> None:
    names = [figure.name for figure in page.figures]
    assert names == [
        *("comparison", "front", "refined", "positions", "strength", "history", "hypervolume"),
        *("importance", "separation", "projection", "norms"),
    ]
    assert "not shown" not in notes(page)
    for figure in page.figures:
        assert figure.rows and figure.title and figure.caption and figure.summary
        assert all(name in row for row in figure.rows for name in figure.columns)


def test_a_study_without_what_a_run_records_says_so_in_a_line_each(studies: Path) -> None:
    bare = report(studies, run={}).page()
    names = {figure.name for figure in bare.figures}
    assert not names & {"separation", "projection", "norms"} and "front" in names
    lines = [line for line in notes(bare).splitlines() if "did not record" in line]
    assert len(lines) == 5
    assert "Separation of the directions" in lines[0]
    render(bare)


def test_a_search_that_runs_has_a_report(tmp_path: Path) -> None:
    make_study(tmp_path, trials=3, wanted=50)
    page = report(tmp_path).page()
    assert "The search holds 3 of 50 trials so far" in page.lead
    assert "Parameter importance: not shown" in notes(page)
    render(page)


def test_what_a_model_says_stays_text(html: str) -> None:
    assert "<script>document.title" not in html and "<img" not in html
    assert html.count("&lt;script&gt;document.title") >= 3
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", html)
    assert "␀␛[31m[U+202E]" in html


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\r\n\r", "\n␍"),
        ("\x07\x7f\x9b", "␇[U+007F][U+009B]"),
        ("\u2066x\u2069\u200b\ufeff", "[U+2066]x[U+2069][U+200B][U+FEFF]"),
        ("\ud800", "[U+D800]"),
        ("é 日本 \U0001f469\u200d\U0001f373", "é 日本 \U0001f469\u200d\U0001f373"),
    ],
)
def test_control_characters_are_seen_and_letters_are_left(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_links_of_charts_lead_to_trials_that_are_there(html: str) -> None:
    elements = Elements(html).elements
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for tag, a in elements if tag == "a"]
    assert {t for t in targets if t and t.startswith("#trial-")} == {
        f"#trial-{number}" for number in range(14)
    }
    assert {t[1:] for t in targets if t} <= set(ids)
    reached = [a for tag, a in elements if tag == "a" and "tabindex" not in a]
    assert "#trial-12" in {a["href"] for a in reached}


def test_responses_to_harmful_prompts_are_shown_on_request_alone(studies: Path, html: str) -> None:
    assert "VERY BAD TEXT" not in html and "The answer is four." in "".join(Elements(html).text)
    assert "Responses to 1 harmful prompts are left out" in html
    shown = render(report(studies, harmful=True).page())
    assert "VERY BAD TEXT" in shown


def test_original_and_chosen_trial_stand_side_by_side(html: str) -> None:
    (sides, *_) = re.findall(r'<div class="sides">(.*?)<details>', html, re.DOTALL)
    text = " ".join(" ".join(Elements(sides).text).split())
    assert text == "original The answer is 4. trial 12 The answer is four."
    assert '<span class="same">The answer is </span>' in sides
    assert "A lemon." in html and "A lemon." not in sides


def test_verdicts_are_told_prompt_by_prompt(page: Page) -> None:
    (section,) = (section for section in page.sections if section.name == "verdicts")
    (table,) = section.tables
    assert table.headings[:2] == ("prompt", "original") and "trial 12" in table.headings
    refused = [row[1] for row in table.rows]
    assert refused == ["refused"] * 7 + ["degenerate (loop)"]
    after = [row[table.headings.index("trial 12")] for row in table.rows]
    assert after == ["not"] * 7 + ["degenerate (loop)"]


def test_verdicts_of_older_studies_are_shown_without_what_is_degenerate() -> None:
    score = refusals(1)
    old = replace(score, details={"refused": [0]})
    judged = replace(score, details={"counted": [0]})  # by a judge that kept no verdicts
    scores = {"original": {"judge": judged, "refusals": old}, "none": {}}
    tables = verdicts({"harmful": ["a", "b"]}, {}, scores)
    assert [table.columns for table in tables] == [{"original": ["refused", "not"]}]


def test_the_result_has_both_parts_of_a_kl_below_it(studies: Path) -> None:
    study = read_study("s", studies)
    (number,) = (r.number for r in study.records if r.number == 12)
    parts = {
        "behaviour": {"mean": 0.02, "standard_error": 0.003},
        "remainder": {"mean": 0.03, "standard_error": 0.004},
    }
    tested = study.tested[number]
    split = replace(tested["teacher_forced_kl"], details=parts)
    tests = {**study.tested, number: {**tested, "teacher_forced_kl": split}}
    (table,) = report(studies, study=replace(study, tested=tests)).page().sections[0].tables
    place = [row[0] for row in table.rows].index("KL")
    assert table.rows[place + 1 : place + 3] == [
        ("KL: refusing or not", "–", "0.0200 ± 0.0030"),
        ("KL: everything else", "–", "0.0300 ± 0.0040"),
    ]


def test_trials_that_cannot_be_told_from_one_of_the_front_stand_with_it(studies: Path) -> None:
    study = read_study("s", studies)
    best = study.front[0]
    scores = {n: replace(s, per_prompt=(s.value or 0.0,) * 3) for n, s in best.scores.items()}
    twin = tuple(value + 1e-6 for value in best.objectives)
    records = [replace(r, scores=scores) if r.number == best.number else r for r in study.records]
    records.append(replace(best, number=99, scores=scores, objectives=twin))
    page = report(studies, study=replace(study, records=tuple(records))).page()
    assert f": {best.number} like 99." in notes(page)
    (front,) = (figure for figure in page.figures if figure.name == "front")
    named = {row["trial"]: row["like"] for row in front.rows if row["like"]}
    assert "like" in front.columns and named == {best.number: "99"}


def test_the_trial_that_was_saved_is_what_the_report_is_about(studies: Path, page: Page) -> None:
    assert "Trial 12, the trial that was saved last" in page.sections[0].notes[0]
    study = read_study("s", studies)
    assert choose(study, None, "trial=3") == (choose(study, 12, "trial=3"))
    chosen = choose(study, None, None)
    assert chosen is not None and chosen.reason == "what likely-refusals=0.05 picks"
    with pytest.raises(SelectionError):
        choose(study, 12, "trial=99")
    assert choose(study, 77, None) == chosen


def test_the_strength_of_a_refined_edit_is_that_of_its_operators(studies: Path) -> None:
    study = read_study("s", studies)
    refined = [record for record in study.records if record.number == 12]
    rows = strength_rows(study, refined, PlanStore(studies, "s"))
    by_component = {
        name: [r["strength"] for r in rows if r["component"] == name]
        for name in ("attention", "mlp")
    }
    assert by_component == {"attention": [0.0] * LAYERS, "mlp": pytest.approx([2.0] * LAYERS)}
    assert strength_rows(study, refined, PlanStore(studies, "other")) == []


@pytest.mark.parametrize("content", [b"pickle", safetensors.torch.save({"x": torch.ones(1)})])
def test_a_file_that_is_no_learned_edit_is_a_line(tmp_path: Path, content: bytes) -> None:
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "s.artifacts").mkdir()
    (tmp_path / "s.artifacts" / digest).write_bytes(content)
    with pytest.raises(StudyError, match=f"{digest}' is no learned edit: "):
        PlanStore(tmp_path, "s").load(digest)


def named(page: Page, name: str) -> Figure:
    (figure,) = (figure for figure in page.figures if figure.name == name)
    return figure


def test_refined_trials_stand_beside_their_start(page: Page) -> None:
    figure = named(page, "refined")
    row, from_screened = figure.rows
    assert (row["trial"], row["start"], row["x"], row["y"]) == (12, 2, 0.05, 0.0)
    assert row["x_before"] > row["x"] and not row["predicted"]
    assert (from_screened["start"], from_screened["y_before"]) == (SCREENED, 0.34)
    assert from_screened["x_before"] is not None and from_screened["predicted"]
    assert from_screened["y_before_text"] == "34% predicted"
    assert "refusals (share) 34% predicted before" in figure.summary
    assert "A hollow circle is a start that was screened" in figure.caption


def test_screened_trials_are_hollow_marks_off_the_front(page: Page, html: str) -> None:
    figure = named(page, "front")
    (row,) = (row for row in figure.rows if row["trial"] == SCREENED)
    assert (row["kind"], row["front"], row["y"]) == ("searched, predicted", False, 0.34)
    assert row["y_low"] is row["y_high"] is None and row["x_low"] < row["x"] < row["x_high"]
    assert row["text"].startswith(f"Trial {SCREENED}, searched, predicted: refusals 34% predicted")
    assert "Hollow marks are screened trials" in figure.caption
    assert figure.summary.startswith("13 complete trials, ")
    assert "; 1 screened, with what is predicted." in figure.summary
    marks = re.findall(r"<path [^>]*>", re.findall(r'id="figure-front".*?</svg>', html, re.S)[0])
    (mark,) = (mark for mark in marks if f"Trial {SCREENED}, searched, predicted" in mark)
    hollow = [mark for mark in marks if f'stroke="{COLOURS[5]}"' in mark and "fill=" not in mark]
    assert mark in hollow and len(hollow) == 2  # the other one stands in the legend
    assert ">searched, predicted</text>" in html


def test_the_history_shows_what_is_predicted_and_never_as_the_best(studies: Path) -> None:
    study = read_study("s", studies)
    changed = [
        replace(record, predicted={"refusals": -1.0}) if record.state == "screened" else record
        for record in study.records
    ]
    rows = history_rows(replace(study, records=tuple(changed)))
    refused, cost = (row for row in rows if row["trial"] == SCREENED)
    assert (refused["kind"], refused["value"], cost["kind"]) == ("predicted", -1.0, "searched")
    assert refused["score"] == "refusals (share)" and refused["best"] >= 0
    later = [row["best"] for row in rows if row["score"] == refused["score"]]
    assert min(later) >= 0
    figure = history_figure(rows)
    assert "hollow marks are what is predicted" in figure.caption
    assert "hollow" not in history_figure([r for r in rows if r["kind"] != "predicted"]).caption


def test_the_page_says_how_well_rung_one_foretells_what_is_counted(studies: Path) -> None:
    """Refined trials, which were trained on what it predicts, are left out."""
    made = report(studies)
    assert "with its 95% interval: not known, too few trials have both." in notes(made.page())
    records = [
        replace(r, predicted={"refusals": 9.0 if r.refinement else r.scores["refusals"].value})
        if r.state == "complete"
        else r
        for r in made.study.records
    ]
    both = replace(made, study=replace(made.study, records=tuple(records)))
    pairs = sum(record.state == "complete" and not record.refinement for record in records)
    assert f"with its 95% interval: 1.00 (1.00 to 1.00, {pairs} trials)." in notes(both.page())


def test_the_list_of_trials_states_what_is_predicted(page: Page) -> None:
    (trials,) = (section.all_trials for section in page.sections if section.all_trials)
    (cells,) = (row.cells for row in trials.rows if row.number == SCREENED)
    assert cells[:2] == ("screened", "34% predicted") and "nats" not in cells[2]


def test_the_command_line_writes_page_and_pictures(
    studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out" / "r.html"
    (tmp_path / "README.md").write_text("# m\n\n## Limits of the measurement\n\nx\n")
    words = ["report", str(studies), "-o", str(target), "--png", str(tmp_path / "png")]
    words += ["--card", str(tmp_path)]
    assert main(words) == 0
    assert str(target) in capsys.readouterr().out and target.read_text("utf-8").startswith("<!DOC")
    assert "![13 complete trials" in (tmp_path / "README.md").read_text()
    names = {path.stem for path in (tmp_path / "png").iterdir()}
    assert names == {"front", "comparison", "refined", "positions", "strength"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (tmp_path / "png").iterdir())


@pytest.mark.parametrize(
    ("terminal", "browser", "notice"),
    [
        (True, True, ""),
        (True, False, "no browser was found"),
        (True, webbrowser.Error("could not locate runnable browser"), "no browser was found"),
        (False, True, "stdout is no terminal"),
    ],
)
def test_the_page_is_opened_where_somebody_sees_it(
    studies: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    browser: bool | Exception,
    notice: str,
) -> None:
    opened: list[str] = []

    def open_page(url: str) -> bool:
        opened.append(url)
        if isinstance(browser, Exception):
            raise browser
        return browser

    monkeypatch.setattr(webbrowser, "open", open_page)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    target = tmp_path / "a page.html"
    assert main(["report", str(studies), "-o", str(target), "--open"]) == 0
    shown = capsys.readouterr()
    assert opened == ([target.as_uri()] if terminal else []) and target.is_file()
    said = [line for line in (shown.out + shown.err).splitlines() if "--open" in line]
    assert len(said) == bool(notice) and notice in "".join(said)
    opened.clear()
    assert main(["report", str(studies), "-o", str(target)]) == 0 and opened == []
    assert main(["report", str(studies), "-o", str(target), "--open", "--json"]) == 0
    assert opened == [] and "stdout is no terminal" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "zzz"], "there is no study"),
        (["report", "--pick", "trial=99"], "no finished trial"),
        (["report", "s", "more"], "unexpected argument 'more'"),
    ],
)
def test_wrong_requests_are_errors_of_one_line(
    studies: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main([*words, "--study-dir", str(studies)]) != 0
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_library_is_an_error_that_names_the_extra(
    page: Page, monkeypatch: pytest.MonkeyPatch, studies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert main(["report", str(studies)]) == 1
    error = capsys.readouterr().err
    assert "pip install 'heretic-kl[report]'" in error and error.count("\n") == 1


def test_pictures_stand_on_white(page: Page) -> None:
    figure = pictures(page)[0]
    assert len(png(figure.drawing, scale=1)) > 1000


def test_in_a_browser_what_a_model_says_is_text_and_links_open_trials(
    html: str, tmp_path: Path
) -> None:
    shown, _ = loaded(html, tmp_path, "#trial-12")
    assert "<title>Edits of m</title>" in shown and "<img" not in shown
    assert re.search(r'<details class="trial" id="trial-12" open="">', shown)
    policy = re.sub(
        r"'sha256-[^']*'", "'sha256-AAAA'", html
    )  # a page that is not as it was written
    assert 'id="trial-12" open=""' not in loaded(policy, tmp_path, "#trial-12")[0]
