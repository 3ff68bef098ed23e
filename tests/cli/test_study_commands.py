"""A finished study from the command line: listed, shown and saved without a search; JSON lines."""

import json
from pathlib import Path

import pytest
from hub_server import TOKEN
from huggingface_hub import ModelCard
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from heretic_kl.cli import main as cli
from heretic_kl.cli.scorer import TEMPLATE
from heretic_kl.search import alike_behind, read_study
from heretic_kl.ui.json_lines import event_schema


def test_a_search_tells_a_program_everything(searched):
    names = [line["event"] for line in searched]
    assert names.count("trial_finished") == 4 and names[-1] == "ended"
    for name in ("model_loaded", "calibration_step", "study_opened", "trial_tested"):
        assert name in names
    (front,) = [line for line in searched if line["event"] == "front_shown"]
    last = [line for line in searched if line["event"] == "trial_finished"][-1]
    assert front["front"] == last["front"] and front["study"] == "mine"


def test_trials_lists_what_the_search_found(searched, call, events):
    code, lines = events("trials", "mine")
    finished = [line["record"] for line in searched if line["event"] == "trial_finished"]
    shown = [line for line in lines if line["event"] == "trial_shown"]
    assert code == 0 and [line["record"] for line in shown] == finished
    (told,) = [line for line in lines if line["event"] == "front_shown"]
    front, study = told["front"], read_study("mine", Path("studies"))
    assert [line["record"]["number"] for line in shown if line["on_front"]] == sorted(front)
    like = alike_behind(study.front, study.records)
    assert told["like"] == {str(number): list(others) for number, others in like.items()}
    (after_search,) = [line for line in searched if line["event"] == "front_shown"]
    assert told["like"] == after_search["like"]
    code, out, err = call("trials", "mine", "--all")
    assert (code, err) == (0, "") and "study mine: 4 complete" in out
    assert out.count("complete  ") == 4 and "← knee" in out


def test_trials_lists_finished_ones_within_limits_best_first(searched, call, events):
    records = [line["record"] for line in searched if line["event"] == "trial_finished"]
    by_kl = sorted(records, key=lambda record: record["scores"]["teacher_forced_kl"]["value"])
    limit = by_kl[2]["scores"]["teacher_forced_kl"]["value"]
    words = ["trials", "mine", "--sort", "teacher_forced_kl"]
    words += ["--where", f"max-teacher_forced_kl={limit!r}"]
    code, lines = events(*words)
    shown = [line["record"]["number"] for line in lines if line["event"] == "trial_shown"]
    assert code == 0 and shown == [record["number"] for record in by_kl[:3]]
    code, out, _ = call(*words)
    listed = [int(line.split()[0]) for line in out.splitlines() if "  complete  " in line]
    assert code == 0 and listed == shown
    code, out, _ = call("trials", "mine", "--where", "max-refusals=-1")
    assert code == 0 and "no finished trial is within max-refusals=-1" in out.splitlines()[1]
    code, _, err = call("trials", "mine", "--where", "trial=2")
    assert code == 1 and "'trial=2' is no limit" in err


def test_show_prints_one_trial(searched, call, events):
    code, out, _ = call("show", "mine", "--trial", "2")
    assert code == 0 and out.startswith("Trial 2\n") and "direction" in out
    code, lines = events("show", "--pick", "knee")
    assert code == 0 and lines[0]["event"] == "trial_shown" and lines[0]["on_front"]


def test_show_compares_two_trials_by_prompt(searched, call, events):
    records = [line["record"] for line in searched if line["event"] == "trial_finished"]
    code, lines = events("show", "mine", "--trial", "2", "--compare", "1")
    (content,) = [line["content"] for line in lines if line["event"] == "result"]
    assert code == 0 and (content["first"], content["second"]) == (2, 1)
    for name, pair in content["differences"]["validation"].items():
        first, second = (records[number]["scores"][name] for number in (2, 1))
        assert len(first["per_prompt"]) == pair["prompts"] == 3
        assert pair["mean"] == pytest.approx(first["value"] - second["value"], abs=1e-6)
    code, out, err = call("show", "mine", "--trial", "2", "--compare", "1")
    assert (code, err) == (0, "") and out.startswith("Trial 2 minus trial 1, validation prompts\n")
    assert "paired by prompt" in out
    assert call("show", "mine", "--trial", "2", "--compare", "99")[0] == 3


def test_save_writes_a_trial_without_a_search(searched, call, events, workplace):
    code, lines = events("save", "mine", "--trial", "2", "-o", "saved")
    names = [line["event"] for line in lines]
    assert code == 0 and "trial_finished" not in names
    (saved,) = [line for line in lines if line["event"] == "model_saved"]
    assert saved["folder"] == "saved" and saved["merge_kl"] <= saved["noise_floor"]
    assert (workplace / "saved" / "model.safetensors").is_file()
    code, out, _ = call("trials", "mine")
    assert code == 0 and "test" in out  # what was measured on the way is kept


def test_a_trial_is_saved_after_an_update_and_its_study_stays_as_it_is(
    searched, events, workplace, monkeypatch
):
    """Other code of a scorer gives other scores, which do not stop anyone from saving an edit."""
    assert events("save", "mine", "--trial", "2", "-o", "before")[0] == 0
    monkeypatch.setattr("heretic_kl.scoring.scorer_code", lambda use: "of another version")
    journal = workplace / "studies" / "mine.journal"
    content = journal.read_bytes()
    code, lines = events("save", "mine", "--trial", "2", "-o", "after")
    notices = [line["message"] for line in lines if line["event"] == "notice"]
    assert code == 0 and any("measured by other code than this" in text for text in notices)
    assert journal.read_bytes() == content
    weights = [
        (workplace / name / "model.safetensors").read_bytes() for name in ("before", "after")
    ]
    assert weights[0] == weights[1]


def test_a_study_whose_scorer_lies_elsewhere_now_is_saved(call, workplace):
    file = workplace / "before" / "certain.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(TEMPLATE, encoding="utf-8")
    words = ["--scorers.plugged.use", f"{file}:NewScorer", "--scorers.plugged.role", "monitor"]
    plugged = ["--study-name", "moved", "--trials", "1", "--test-trials", "0"]
    assert call(*plugged, *words)[0] == 0
    moved = file.rename(workplace / "certain.py")
    save = ["save", "moved", "--trial", "0", "-o", "of_moved"]
    code, _, err = call(*save, "--scorers.plugged.use", f"{moved}:NewScorer")
    assert code == 0, err
    assert "other code" not in err


def test_save_uploads_what_it_saved(searched, call, events, workplace, hub):
    code, lines = events("save", "mine", "--trial", "2", "-o", "up", "--upload", "team/model")
    (uploaded,) = [line for line in lines if line["event"] == "model_uploaded"]
    assert code == 0 and uploaded["repo"] == "team/model" and uploaded["private"]
    folder = workplace / "up"
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    there = hub.files("team/model")
    assert there == {".gitattributes": b"", **{n: p.read_bytes() for n, p in files.items()}}
    results = ModelCard(there["README.md"].decode()).data.eval_results
    assert {(result.metric_type, result.dataset_config) for result in results} == {
        ("refusals", "harmful"),
        ("teacher_forced_kl", "harmless"),
        ("false_refusals", "harmless"),  # here the borderline prompts are the harmless ones
    }
    assert all("interval_95" in result.metric_args for result in results)
    # What is not empty is found out before the model is loaded, and --overwrite is about folders.
    again = ["save", "mine", "--trial", "2", "-o", "up", "--overwrite", "--upload", "team/model"]
    code, out, err = call(*again)
    assert code == 1 and "team/model is not empty" in err and "Loading" not in err


def test_a_model_that_is_not_uploaded_is_still_saved(searched, call, workplace, hub):
    hub.answers["commit/main"] = (403, {}, json.dumps({"error": f"no place for {TOKEN}"}))
    words = ["save", "mine", "--trial", "2", "-o", "kept", "--save-as", "lora", "--upload", "model"]
    code, out, err = call(*words)
    assert code == 1 and "saved LoRA adapter to kept" in out
    assert "the token may not do this (no place for ***)" in err
    assert "try again with `heretic-kl upload kept --repo me/model`" in err
    log = (workplace / "studies" / "mine.log").read_text()
    assert "no place for ***" in log
    assert not any(TOKEN in text for text in (out, err, log))
    hub.answers.clear()
    assert call("upload", "kept", "--repo", "me/model")[0] == 0
    weights = (workplace / "kept" / "adapter_model.safetensors").read_bytes()
    assert hub.files("me/model")["adapter_model.safetensors"] == weights
    written = (path for path in workplace.rglob("*") if path.is_file())
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_a_save_that_cannot_be_uploaded_is_refused_before_the_work(
    searched, call, workplace, hub, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = call("save", "mine", "--trial", "2", "-o", "never", "--upload", "model")
    assert code == 1 and "not logged in to the hub" in err and "Loading" not in err
    assert not (workplace / "never").exists()


def test_a_person_saves_and_uploads(searched, call, workplace, hub, monkeypatch):
    monkeypatch.setattr("heretic_kl.cli.optimize.at_terminal", lambda: True)
    up, enter, ctrl_c, ctrl_u = "\x1b[A", "\r", "\x03", "\x15"
    keys = enter + enter + ctrl_u + "menu" + enter  # the knee, merged, its folder
    keys += up * 2 + enter + enter + ctrl_c * 4  # upload, to a repository of the folder's name
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        pipe.send_text(keys)
        code, out, err = call("--study-name", "mine")
    assert code == 0 and f"uploaded menu to {hub.url}/me/menu (private)" in out, err
    weights = (workplace / "menu" / "model.safetensors").read_bytes()
    assert hub.files("me/menu")["model.safetensors"] == weights


def test_a_rule_that_no_trial_meets_has_a_code_of_its_own(searched, call, events, workplace):
    for words in (["save", "mine"], ["--study-name", "mine"]):
        words = [*words, "--pick", "max-refusals=-1", "--save", "none"]
        code, lines = events(*words)
        (failed,) = [line["lines"] for line in lines if line["event"] == "failed"]
        assert code == 3 and "the nearest is trial " in failed[0] and "--trial " in failed[0]
        assert not (workplace / "none").exists()
    assert call("show", "--trial", "99")[0] == 3


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["show"], 2, "say which trial: --trial NUMBER or --pick RULE"),
        (["show", "--preview"], 2, "say which trial: --trial NUMBER or --pick RULE"),
        (["show", "--trial", "1", "--compare", "2", "--preview"], 2, "differences: leave one out"),
        (["show", "--trial", "1", "--preview", "odd"], 2, "preview must be one of harmless"),
        (["show", "--trial", "1", "--preview", "--test"], 2, "--test measures a trial: leave out"),
        (["show", "--trial", "1", "--device", "cpu"], 2, "--device"),
        (["show", "--trial", "1", "--preview=false", "--device", "cpu"], 2, "flag --device"),
        (["save", "mine", "--trial", "1", "--pick", "knee"], 2, "both name a trial"),
        (["trials", "mne"], 1, "no study 'mne' in 'studies'; did you mean mine?"),
        (["show", "--pick", "best"], 1, "unknown pick rule 'best'"),
        (["save", "mine", "--trial", "1", "--public"], 2, "say where to with --upload NAME"),
        (["trials", "--trails", "1"], 2, "unknown flag --trails"),
        (["trials", "mine", "--sort", "odd"], 1, "no score 'odd'; there are refusals"),
        (["trials", "mine", "--where", "knee"], 1, "'knee' is no limit"),
        (["save", "--trial", "1", "--config", "config.toml"], 2, "the study has settings"),
    ],
)
def test_mistakes_are_one_line_and_one_event(searched, call, events, words, code, message):
    assert call(*words)[0] == code
    code_as_event, lines = events(*words)
    assert code_as_event == code and lines[0]["event"] == "failed"
    assert len(lines[0]["lines"]) == 1 and message in lines[0]["lines"][0]


def test_the_schema_is_printed(call):
    code, out, _ = call("events")
    assert code == 0 and json.loads(out) == event_schema()
    page = (Path(cli.__file__).parents[2] / "docs" / "commands.md").read_text(encoding="utf-8")
    names = {
        table["properties"].get("event", {}).get("const")
        for table in event_schema()["$defs"].values()
    }
    assert {name for name in names - {None} if f"`{name}`" not in page} == set()


@pytest.mark.parametrize(
    "behaviour",
    [
        ["--scorers.refusals.enabled", "false", "--scorers.keyword_rate.use", "keyword_rate"]
        + ["--scorers.keyword_rate.settings.phrases", '["flour", "mix"]'],
        ["--scorers.kept_refusals.use", "false_refusals"]
        + ["--scorers.kept_refusals.role", "maximize", "--pick", "min-kept_refusals=0"],
    ],
    ids=["keyword rate", "kept refusals"],
)
def test_another_behaviour_is_searched_for(events, behaviour):
    code, lines = events("--trials", "2", "--test-trials", "0", *behaviour)
    trials = [line["record"] for line in lines if line["event"] == "trial_finished"]
    names = {word.split(".")[1] for word in behaviour if word.startswith("--scorers")}
    assert code == 0 and len(trials) == 2
    for trial in trials:
        assert trial["state"] == "complete" and (names & set(trial["scores"])) - {"refusals"}
