"""Fronts in the search benchmark: what is saved, judged, cached, compared and drawn of them."""

import json
import shutil
import sqlite3
import sys
from datetime import datetime
from pathlib import Path

import pytest
from test_search_quality import call, judged, measure, models, run, trial  # noqa: F401 (fixtures)

from benchmarks.search_quality import __main__ as command
from benchmarks.search_quality import (
    abliterix_runner,
    heretic_kl_runner,
    judge,
    senbonzakura_runner,
    table,
    task,
    temaq_runner,
    validation,
    volume,
)
from benchmarks.search_quality.plot import save as draw
from benchmarks.search_quality.results import Results

FLOOR = 0.01


def point(refusals, kl, seconds):
    return {
        "candidate": f"trial{seconds}",
        "t_process": seconds,
        "trial": {},
        "judged": judged(refusals, kl),
    }


def with_front(tool, seed, pick, *front, minutes="3"):
    made = run(tool, seed, {minutes: (pick, "")})
    made["choices"][minutes] |= {"front": list(front), "front_note": ""}
    return made


def asked(tmp_path, front=3):
    return task.Task(
        tmp_path, tmp_path, tmp_path, (3.0,), 0, 1, "float32", 40, 9, 0.05, 0.05, front
    )


def test_a_front_is_spread_by_refusals_and_holds_no_dominated_or_late_trial():
    kls = {0: 0.9, 10: 0.5, 20: 0.4, 21: 0.3, 22: 0.2, 40: 0.1}
    trials = [trial(n, refusals, kl, 10 + n) for n, (refusals, kl) in enumerate(kls.items())]
    trials += [trial(8, 12, 0.6, 5), trial(9, 30, 0.01, 99)]  # dominated; late
    assert [t["number"] for t in task.spread_front(trials, 3, 60)] == [0, 2, 5]
    assert [t["number"] for t in task.spread_front(trials, 3, 60, without=2)] == [0, 3, 5]
    assert [t["number"] for t in task.spread_front(trials, 9, 60)] == [0, 1, 2, 3, 4, 5]
    assert task.spread_front(trials, 0, 60) == []


def test_a_front_that_cannot_be_saved_leaves_the_choice_with_a_note(tmp_path):
    trials = [trial(n, n, 1 - n / 10, 10) for n in range(4)]
    choice = task.Choice("model", 9.0, trial=trials[1])
    saved = []
    made = task.with_front(choice, trials, asked(tmp_path), 3.0, saved.extend)
    assert [c.candidate for c in made.front] == ["trial0", "trial2", "trial3"]
    assert [t["number"] for t in saved] == [0, 2, 3]

    def fails(chosen):
        raise SystemExit("a log\nits last line")

    made = task.with_front(choice, trials, asked(tmp_path), 3.0, fails)
    assert (made.front, made.front_note) == ((), "front not saved: its last line")
    none = task.Choice("", 9.0)
    assert task.with_front(none, trials, asked(tmp_path), 3.0, fails) == none


def test_hypervolume_is_that_of_an_example_worked_by_hand():
    # With a floor of 0.01 the KLs 0.01, 0.1 and 1 lie at 0, 1/2 and 1. Of 100 prompts 60 and 20 are
    # refused: 1 * 0.4 and 0.5 * 0.8, of which 0.5 * 0.4 is common. 0.4 + 0.4 - 0.2 = 0.6.
    first, second = point(60, 0.01, 50), point(20, 0.1, 70)
    dominated, outside = point(70, 0.2, 20), point(0, 1.5, 10)
    (choice,) = with_front("temaq", 0, None, first, second, dominated, outside)["choices"].values()
    choice["candidate"] = ""
    assert volume.place(first["judged"], FLOOR) == (0, 0.6)
    assert volume.place(second["judged"], FLOOR) == pytest.approx((0.5, 0.2))
    assert volume.volume(choice, FLOOR) == pytest.approx(0.6)
    seconds, values = zip(*volume.history(choice, FLOOR), strict=True)
    assert seconds == (10, 20, 50, 70)
    assert values[:2] == pytest.approx((0, 0.3 * (1 - volume.place(dominated["judged"], FLOOR)[0])))
    assert values[2:] == pytest.approx((0.4, 0.6))
    below = [point(60, 0.0001, 1)]  # no better than the floor
    assert volume.volume({**choice, "front": below}, FLOOR) == pytest.approx(0.4)
    del choice["front"]
    assert volume.volume(choice, FLOOR) is None


RUNS = [
    with_front("heretic-kl", 0, judged(4, 0.02), point(1, 0.05, 90), point(50, 0.011, 20)),
    with_front("heretic-kl", 1, judged(3, 0.03)),
    with_front("heretic", 0, judged(9, 0.1), point(80, 0.02, 90)),
    with_front("heretic", 1, judged(8, 0.1)),
    with_front("temaq", 0, judged(40, 0.01)),
    run("temaq", 1, {"3": (judged(40, 0.01), "")}),
]


def test_the_table_shows_hypervolume_and_says_where_no_peer_meets_the_target():
    text = table.markdown(RUNS, {"demo": FLOOR})
    row = next(line for line in text.splitlines() if "| heretic-kl |" in line)
    low, high = (volume.volume(r["choices"]["3"], FLOOR) for r in (RUNS[1], RUNS[0]))
    assert f"| 3, 1 | {(low + high) / 2:.3f} ({low:.3f} to {high:.3f}) |" in row
    assert "no peer at the target; 0.25 of Heretic's at 8% refusals" in row
    temaq = next(line for line in text.splitlines() if "| Temaq |" in line)
    assert f"| 1 | {volume.volume(RUNS[4]['choices']['3'], FLOOR):.3f} |" in temaq
    assert "- heretic-kl: hypervolume above every peer's in 2 of 2 runs" in text
    assert "demo 0.0100" in text
    assert "3 minutes, heretic-kl: no judged point of a peer's front meets the target" in text
    lucky = with_front("heretic", 0, judged(9, 0.1), point(5, 0.2, 80), point(0, 0.5, 90))
    text = table.markdown([*RUNS[:2], lucky, RUNS[3]], {"demo": FLOOR})
    least = "0.12 of Heretic's unpicked 5 at 0.2000"
    assert least in text


def test_the_plot_has_fronts_and_hypervolume_over_time(tmp_path):
    draw(RUNS, tmp_path / "a.svg", {"demo": FLOOR})
    text = (tmp_path / "a.svg").read_text()
    assert "hypervolume of the judged front" in text
    old = [{**r, "choices": {m: _old(c) for m, c in r["choices"].items()}} for r in RUNS]
    draw(old, tmp_path / "old.svg", {})
    assert "hypervolume" not in (tmp_path / "old.svg").read_text()
    assert "hypervolume above" not in table.markdown(old, {})


def _old(choice):
    return {name: value for name, value in choice.items() if not name.startswith("front")}


def test_validation_is_compared_over_equal_positions_with_its_interval():
    of_judge = {**judged(8, 0.3), "kl_by_length": [0.6, 0.5, 0.4]}
    tested = {"refusals": {"value": 0.5}, "teacher_forced_kl": {"value": 0.1}}
    picked = {"refusals": 5, "n_harmful": 100, "kl": 0.2, "kl_tokens": 3, "test_scores": tested}
    other = {"refusals": 0, "n_harmful": 100, "kl": 0.2, "kl_tokens": 1}
    long = {**other, "kl_tokens": 16}
    trials = [picked, other, long, None]
    choices = [{"trial": t, "judged": of_judge} for t in trials]
    made = validation.held([*choices, {"trial": other, "judged": None}])
    assert made.judged_ratios == pytest.approx([2, 3])
    assert made.test_ratios == pytest.approx([0.5])
    assert made.judged_inside == [True, False, False]  # 8% in 2 to 11%, not in 0 to 4%
    assert made.test_inside == [False]
    assert validation.cells(made) == ["0.50", "2.50", "0 of 1", "1 of 3"]


def test_an_edit_is_judged_once_wherever_it_is_saved(models, tmp_path, monkeypatch):  # noqa: F811
    asked_of = measure()
    first = judge.judge(models / "reference", models / "other", asked_of, tmp_path / "cache")
    shutil.copytree(models / "other", tmp_path / "again")
    monkeypatch.setattr(judge, "Model", None)  # nothing can be loaded
    again = judge.judge(models / "reference", tmp_path / "again", asked_of, tmp_path / "cache")
    assert again == json.loads(json.dumps(first))
    longer = judge.Measure(asked_of.prompts, 6, 5, 2)
    with pytest.raises(TypeError):
        judge.judge(models / "reference", tmp_path / "again", longer, tmp_path / "cache")


def test_the_noise_floor_is_that_of_another_dtype(models, tmp_path):  # noqa: F811
    floors = [
        judge.rounding_floor(models / "reference", measure(), tmp_path, dtype)["kl"]["mean"]
        for dtype in ("float32", "bfloat16")
    ]
    assert floors[0] == 0 and 0 < floors[1] < 0.1


def test_fronts_are_saved_judged_and_rendered_again_without_a_run(call, tmp_path, capfd):  # noqa: F811
    words = ("--tools", "heretic-kl-classic", "--minutes", "3", "--reserve", "5", "--front", "2")
    assert len(call(*words, "--seeds", "0", "--keep")) == 1
    file = tmp_path / "results.json"
    content = json.loads(file.read_text())
    (choice,) = (r["choices"]["3"] for r in content["runs"])
    assert [p["candidate"] for p in choice["front"]] == ["trial0", "trial2"]
    assert all(p["judged"]["kl"]["mean"] > 0 for p in choice["front"])
    assert "kl_per_prompt" not in choice["front"][0]["judged"]
    assert choice["judged"]["threads"] >= 1 and content["floors"]["demo"] > 0
    printed = capfd.readouterr().out

    (tmp_path / "figure.svg").unlink()
    page = tmp_path / "page.md"
    page.write_text("above\n<!-- results -->\nold\n<!-- end of results -->\nbelow\n")
    assert call("--render", "--guide", str(page)) == []
    assert (tmp_path / "figure.svg").exists()
    tables = capfd.readouterr().out.strip()
    assert tables in printed
    begin, end = "above\n<!-- results -->\n\n", "\n\n<!-- end of results -->\nbelow\n"
    assert page.read_text() == f"{begin}{tables}{end}"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="no lines <!-- results -->"):
        call("--render", "--guide", str(page))

    other = tmp_path / "other.json"
    other.write_text(json.dumps({**content, "runs": [{**content["runs"][0], "seed": 7}]}))
    assert call("--render", "--merge", str(other)) == []
    assert [r["seed"] for r in json.loads(file.read_text())["runs"]] == [0, 7]
    content["facts"]["equal"]["target"] = 0.5
    other.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match="measured with target = 0.05, not 0.5"):
        call("--render", "--merge", str(other))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--front", "-1"], "--front: at least 0"),
        (["--judge-threads", "0"], "--judge-threads: at least 1"),
        (["--merge", "nowhere.json"], "nowhere.json: no results file"),
        (["--render"], "results.json: no results file"),
        (["--guide", "nowhere.md"], "--guide nowhere.md: no such file"),
    ],
)
def test_mistakes_about_fronts_and_files_are_one_line(words, said, call, capfd):  # noqa: F811
    with pytest.raises(SystemExit):
        call(*words)
    assert said in capfd.readouterr().err


def test_a_command_without_a_model_runs_only_to_render(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["search_quality"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--model NAME=FOLDER is missing" in capfd.readouterr().err


def test_results_of_before_there_were_fronts_are_read(tmp_path):
    old = Path(__file__).parents[1] / "benchmarks/results/search_quality_qwen.json"
    results = Results.load(old)
    assert results.floors == {} and "| qwen | 12 | heretic-kl |" in table.markdown(results.runs, {})


LOG = """
28.1 Trial 7/40 | 3.5s | refusal 0.657 first 0.311  KL 0.0213  J 3.1650 | best J 3.1650 @ #7
28.2 Trial 8/40 | 1.3s | refusal 0.679 first 0.433  KL -  J 0.0418 | best J 0.0377 @ #20 | screened
28.3 Candidate (trial #45, J=0.0325): full-generation refusal=0.422 (27/64) KL=0.0100
28.4 Candidate (trial #7, J=0.0325): full-generation refusal=0.438 (28/64) KL=0.0213
28.5 Final selection: trial #7 refusal 0.438 / KL 0.0213
"""


def test_trials_and_pick_of_temaq_are_read_and_a_trial_becomes_its_card():
    lines = [(float(w), r) for w, r in (line.split(" ", 1) for line in LOG.strip().splitlines())]
    first, screened = temaq_runner.read_trials(lines)
    assert (first["number"], first["t_process"], first["refusals"], first["kl"]) == (
        7, 28.1, 0.657, 0.0213,
    )  # fmt: skip
    assert "kl" not in screened
    pick = temaq_runner.read_pick(lines)
    assert (pick["number"], pick["refusals"], pick["n_harmful"], pick["kl"]) == (7, 28, 64, 0.0213)
    assert temaq_runner.read_pick(lines[:-1]) is None
    kernel = {"center": 15.28, "radius": 2.46, "strength": 0.88, "shape": "cosine"}
    params = {"direction_mode": "per_layer", "direction_index": 0.0, "kernels": {}}
    params["kernels"] = {"attn_out": kernel, "mlp_down": kernel}
    card = temaq_runner.card(params)
    assert "| **direction_index** | per layer |" in card
    assert "| **attn.o_proj.max_weight** | 0.88 |" in card
    assert "| **mlp.down_proj.min_weight_distance** | 2.46 |" in card
    params |= {"direction_mode": "global", "direction_index": 13.0}
    assert "| **direction_index** | 13 |" in temaq_runner.card(params)


def journal(states):
    yield {"op_code": 0, "study_name": "s"}
    settings = json.dumps({"optimization": {"num_trials": 9}, "seed": 3})
    yield {"op_code": 2, "user_attr": {"settings": settings}}
    yield {"op_code": 2, "user_attr": {"finished": True}}
    for number, state in enumerate(states):
        yield {"op_code": 4, "datetime_start": f"2026-01-01T00:0{number}:00"}
        figures = {"refusals": 7 + number, "kl_divergence": 0.5}
        yield {"op_code": 8, "trial_id": number, "user_attr": figures}
        end = {"state": state, "datetime_complete": f"2026-01-01T00:0{number}:30"}
        yield {"op_code": 6, "trial_id": number, **end}


def test_a_trial_of_abliterix_is_read_and_stands_alone_in_its_checkpoint():
    lines = list(journal((3, 1)))
    started = datetime.fromisoformat("2026-01-01T00:00:00").timestamp()
    (read,) = abliterix_runner.read_trials(lines, started, 100)
    expected = {"number": 1, "t_process": 90, "seconds": 30, "refusals": 8, "n_harmful": 100}
    assert expected.items() <= read.items()
    alone = abliterix_runner.only(lines, 1)
    (again,) = abliterix_runner.read_trials(alone, started, 100)
    assert again == {**read, "number": 0}
    settings = json.loads(alone[1]["user_attr"]["settings"])
    assert settings == {"optimization": {"num_trials": 1}, "seed": 3}
    assert {"op_code": 2, "user_attr": {"finished": True}} not in alone


def test_trials_of_senbonzakura_are_read_from_its_database(tmp_path):
    assert senbonzakura_runner.read_rows(tmp_path / "none.db") == []
    with sqlite3.connect(tmp_path / "study.db") as database:
        database.executescript(
            """
            CREATE TABLE trials (trial_id, number, state, datetime_start, datetime_complete);
            CREATE TABLE trial_params (trial_id, param_name, param_value);
            CREATE TABLE trial_user_attributes (trial_id, key, value_json);
            INSERT INTO trials VALUES (5, 0, 'COMPLETE', '2026-01-01 00:00:10', '2026-01-01 00:01'),
                (6, 1, 'RUNNING', '2026-01-01 00:01:00', NULL);
            INSERT INTO trial_params VALUES (5, 'dir_mode', 0.0), (5, 'num_directions', 2.0);
            INSERT INTO trial_user_attributes VALUES (5, 'refusals', '0.25'), (5, 'kl', '0.1');
            """
        )
    first, running = senbonzakura_runner.read_rows(tmp_path / "study.db")
    assert first["attrs"] == {"refusals": 0.25, "kl": 0.1} and running["complete"] is None
    weights = {"max_weight": 0.7, "min_weight": 0.2, "min_weight_distance": 4.0}
    for part, position in (("o", 9.0), ("d", 8.0)):
        named = {"max_weight_position": position, **weights}
        first["params"] |= {f"{part}_{name}": value for name, value in named.items()}
    made = senbonzakura_runner.config(first["params"])
    assert (made["o_profile"], made["d_profile"]) == ([9, 0.7, 0.2, 4], [8, 0.7, 0.2, 4])
    assert (made["dir_mode"], made["num_directions"]) == ("per_layer", 2)
    assert made["direction_index"] is None


def test_a_trial_of_ours_is_saved_as_the_program_saves_it(models, tmp_path):  # noqa: F811
    prompts, folder = tmp_path / "prompts", tmp_path / "run"
    folder.mkdir()
    task.write_builtin_prompts(prompts)
    for file in prompts.iterdir():
        file.write_text("\n".join(judge.read_prompts(file, 12)) + "\n")
    numbers = {"minutes": (5.0,), "seed": 0, "threads": 1, "response_tokens": 4}
    rest = {"dtype": "float32", "trials": 2, "target": 0.05, "tolerance": 9.0, "front": 1}
    asked_of = task.Task(models / "reference", folder, prompts, **numbers, **rest)
    # A random model refuses nothing: directions are those of the prompts as they are.
    words = "--no-directions.by-response"
    made, choice = heretic_kl_runner.run(asked_of, refine=False, reserve=0, more=words)
    number = choice.trial["number"]
    assert choice.trial["kl_tokens"] == 3 and len(made["trials"]) == 2
    other = next(t["number"] for t in made["trials"] if t["number"] != number)
    assert {c.candidate for c in choice.front} <= {f"trial{other}"}
    heretic_kl_runner.save_unmeasured(asked_of, [number, other])
    weights = [
        (folder / name / "model.safetensors").read_bytes()
        for name in ("model", f"trial{number}", f"trial{other}")
    ]
    assert weights[0] == weights[1] != weights[2]
