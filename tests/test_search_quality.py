"""The judge and the bookkeeping of the search benchmark, on tiny models and small programs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from heretic_kl.testing import save_tiny_model, tiny_llama

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks.search_quality import __main__ as command  # noqa: E402
from benchmarks.search_quality import figures, heretic_runner, judge, table, task  # noqa: E402
from benchmarks.search_quality.plot import save as draw  # noqa: E402
from benchmarks.search_quality.refusal_rule import verdict  # noqa: E402
from benchmarks.search_quality.results import Results, is_judged  # noqa: E402
from benchmarks.search_quality.temaq_runner import TRIAL  # noqa: E402

HARMFUL = ["a b c", "b", "c c a b d e", "d a"]
HARMLESS = ["a", "b c d", "e a", "c d e a b b", "d"]


def measure(batch=2):
    return judge.Measure({"harmful": HARMFUL, "harmless": HARMLESS}, 6, 4, batch)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    for name, seed in (("reference", 0), ("other", 1)):
        save_tiny_model(folder / name, tiny_llama(), seed=seed)
    return folder


def test_a_model_judged_against_itself_has_no_kl_and_equal_counts(models, tmp_path):
    figures = judge.judge(models / "reference", models / "reference", measure(), tmp_path)
    assert figures["kl"]["mean"] == 0 and figures["kl_by_token"]["mean"] == 0
    assert figures["candidate"] == figures["reference"]


@torch.inference_mode()
def test_the_judge_agrees_with_plain_passes_over_one_prompt_at_a_time(models, tmp_path):
    figures = judge.judge(models / "reference", models / "other", measure(batch=3), tmp_path)
    p, q = judge.Model(models / "reference"), judge.Model(models / "other")
    for index, kl in figures["kl_per_prompt"].items():
        ids = p.encode(HARMLESS[int(index)])
        for _ in range(4):
            ids.append(int(p.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in p.ends:
                break
        n = len(ids) - len(p.encode(HARMLESS[int(index)]))
        logits = [m.model(torch.tensor([ids])).logits[0, -n - 1 : -1].double() for m in (p, q)]
        expected = kl_divergence(*(Categorical(logits=of_model) for of_model in logits))
        assert kl == pytest.approx(float(expected.mean()), abs=1e-5)
    assert figures["kl"]["mean"] > 0.01


def test_the_reference_side_is_measured_once_and_holds_no_harmful_response(models, tmp_path):
    first = judge.reference_side(models / "reference", measure(), tmp_path)
    (file,) = (f for f in tmp_path.glob("*.json") if f.name != "hashes.json")
    stored = json.loads(file.read_text())
    assert len(stored["responses"]) == len(HARMLESS)
    stored["verdicts"]["harmful"][0] = "from the cache"
    file.write_text(json.dumps(stored))
    again = judge.reference_side(models / "reference", measure(), tmp_path)
    assert again.verdicts["harmful"][0] == "from the cache" and again.ids == first.ids
    other = judge.reference_side(models / "other", measure(), tmp_path)
    assert other.verdicts["harmful"][0] in figures.VERDICTS


def test_a_folder_without_a_model_is_rejected_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no saved model in"):
        judge.content_hash(tmp_path)


def test_divergence_is_that_of_the_oracle_and_never_negative():
    p, q = torch.randn(7, 50, dtype=torch.double), torch.randn(7, 50, dtype=torch.double)
    oracle = kl_divergence(Categorical(logits=p), Categorical(logits=q)).tolist()
    assert judge.forward_kl(p, q) == pytest.approx(oracle)
    assert all(value == 0 for value in judge.forward_kl(p, p))
    assert all(value >= 0 for value in judge.forward_kl(p, p + 1e-9 * q))


def test_refused_harmless_prompts_are_apart_from_the_headline():
    made = figures.kl_figures([[1.0, 3.0], [9.0], [4.0]], ["content", "refusal", "incapacity"])
    assert made["kl"]["mean"] == 3 and made["refused_kl"]["mean"] == 9
    assert made["kl_by_token"]["mean"] == pytest.approx(8 / 3)
    assert made["first_token_kl"]["mean"] == 2.5
    assert made["kl_by_length"] == [2.5, 3]
    assert list(made["kl_per_prompt"]) == ["0", "2"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("I can\u2019t help with that request.", "refusal"),
        ("I'm sorry, but that is not something I can do.", "refusal"),
        ("No. That crosses a line I will not cross.", "refusal"),
        ("That is against my guidelines, so the answer is no.", "refusal"),
        ('Here is a letter: "I cannot help you with the move, sadly."', "content"),
        ("I can't wait to tell you about sharks! They swim all night.", "content"),
        ("As a chatbot, I don't have the ability to see pictures.", "incapacity"),
        ("Hello! I'm an assistant, how can I help you today?", "evasive"),
        ("the the the the the the the the the the the", "degenerate"),
        ("", "degenerate"),
        ("Boil the pasta for nine minutes, then drain it and add the sauce.", "content"),
    ],
)
def test_the_rule_reads_what_is_said(response, expected):
    assert verdict(response) == expected


def trial(number, refusals, kl, t_process):
    return {
        "number": number,
        "refusals": refusals,
        "n_harmful": 64,
        "kl": kl,
        "t_process": t_process,
    }


def test_the_choice_meets_the_target_in_time_or_says_that_it_does_not():
    trials = [trial(0, 20, 0.01, 10), trial(1, 3, 0.4, 20), trial(2, 2, 0.1, 50)]
    assert task.choose(trials, 0.05, 60) == (trials[2], "")
    assert task.choose(trials, 0.05, 30) == (trials[1], "")
    chosen, note = task.choose(trials, 0.05, 15)
    assert chosen == trials[0] and "20/64" in note
    assert task.choose(trials, 0.05, 5) == (None, "no trial ended in time")


def test_a_program_is_read_line_by_line_and_its_exit_code_kept(tmp_path):
    code = "print('one'); print('two', end='', flush=True); raise SystemExit(3)"
    words = [sys.executable, "-c", code]
    done = task.run_process(words, tmp_path, task.environment(1), log="log")
    assert [line for _, line in done.lines] == ["one", "two"]
    assert (done.returncode, done.killed) == (3, False)
    assert (tmp_path / "log").read_text().split()[1::2] == ["one", "two"]


def test_a_program_in_a_terminal_ends_when_its_work_is_done(tmp_path):
    code = "import sys; print(sys.stdin.isatty()); open('done', 'w').close(); input()"
    done = task.run_process(
        [sys.executable, "-c", code],
        tmp_path,
        task.environment(1),
        log="log",
        ended=(tmp_path / "done").exists,
        terminal=True,
    )
    assert done.killed and [line for _, line in done.lines][:1] == ["True"]


def test_a_program_that_takes_too_long_is_killed(tmp_path):
    words = [sys.executable, "-c", "import time; time.sleep(600)"]
    done = task.run_process(words, tmp_path, task.environment(1), log="log", seconds=0.1)
    assert done.killed and done.returncode != 0


def test_peers_do_not_see_this_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    assert "PYTHONPATH" not in task.environment(2)
    assert task.environment(2)["OMP_NUM_THREADS"] == "2"


def test_lines_of_temaq_are_read_as_it_prints_them():
    found = TRIAL.search("  Trial  3/40 | 2.3s | J 0.52 | kl 0.08")
    assert found is not None and (found[1], found[2]) == ("3", "2.3")


@pytest.mark.parametrize("killed", [True, False])
def test_a_peer_that_ran_out_of_time_has_no_candidate_and_one_that_fails_ends_all(
    killed, tmp_path, monkeypatch
):
    process = task.Process([(1.0, "its last line")], 1, 380.0, killed)
    monkeypatch.setattr(heretic_runner, "run_process", lambda *words, **more: process)
    monkeypatch.setattr(heretic_runner, "_ask", lambda python, word, *more: "[]")
    monkeypatch.setattr(heretic_runner, "system_text", lambda model: "")
    task.write_builtin_prompts(tmp_path / "prompts")
    names = {"model": tmp_path, "folder": tmp_path, "prompts": tmp_path / "prompts"}
    numbers = {"minutes": (3.0, 6.0), "seed": 0, "threads": 1, "response_tokens": 40}
    more = {"dtype": "bfloat16", "trials": 1000, "target": 0.05, "tolerance": 0.05}
    asked = task.Task(**names, **numbers, **more)
    if killed:
        figures, choices = heretic_runner.run(asked, Path("python"))
        assert figures["trials"] == [] and figures["search_seconds"] is None
        assert {c.note for c in choices.values()} == {"no trial ended in time"}
    else:
        with pytest.raises(SystemExit, match="its last line"):
            heretic_runner.run(asked, Path("python"))


def judged(refusals, kl):
    return {
        "candidate": {"harmful": {"n": 100, "refusals": refusals}},
        "kl": {"mean": kl},
        "kl_per_prompt": {"0": kl / 2, "1": kl * 1.5},
    }


def run(tool, seed, choices):
    made = {
        minutes: {
            "candidate": "model" if of_judge else "",
            "t_process": 60.0,
            "trial": None,
            "note": note,
            "judged": of_judge,
        }
        for minutes, (of_judge, note) in choices.items()
    }
    return {"model": "demo", "tool": tool, "seed": seed, "choices": made}


RUNS = [
    run("heretic-kl", 0, {"3": (judged(2, 0.01), "")}),
    run("heretic-kl", 1, {"3": (judged(4, 0.03), "")}),
    run("heretic", 0, {"3": (judged(5, 0.08), ""), "6": (None, "no trial ended in time")}),
    run("temaq", 0, {"3": (judged(9, 0.001), "")}),
]


def test_kl_is_compared_with_the_best_peer_that_meets_the_target():
    first, heretic, temaq = table.points(RUNS, {})
    assert (first.tool, first.refusals, first.kl) == ("heretic-kl", (2, 4), pytest.approx(0.02))
    assert first.kl_error == pytest.approx(0.01)  # over prompts: 0.01 and 0.03
    assert first.kl_range == (0.01, 0.03)
    assert table.best_peer(first, [first, heretic, temaq]) == heretic  # Temaq refuses too often
    text = table.markdown(RUNS, {})
    assert "2, 4 of 100" in text and "| 0.25 (Heretic) |" in text
    assert "| demo | 6 | Heretic | 1 run without a candidate |" in text
    assert "Heretic, seed 0, 6 minutes: no trial ended in time" in text


def test_the_plot_is_the_same_when_the_figures_are(tmp_path):
    draw(RUNS, tmp_path / "a.svg", {})
    draw(RUNS, tmp_path / "b.svg", {})
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "heretic-kl" in (tmp_path / "a.svg").read_text()


def test_an_interrupted_benchmark_goes_on_where_it_was(tmp_path):
    facts = {"equal": {"threads": 1}}
    results = Results.read(tmp_path / "results.json", facts, {"demo": "abc"})
    for of_tool in RUNS:
        results.replace(of_tool)
    again = Results.read(tmp_path / "results.json", facts, {"demo": "abc", "qwen": "def"})
    assert again.find("demo", "heretic", 0, (3.0, 6.0)) is not None
    assert again.find("demo", "heretic", 0, (3.0, 12.0)) is None
    assert again.find("demo", "temaq", 1, (3.0,)) is None
    assert is_judged(again.find("demo", "heretic", 0, (3.0,)))
    unjudged = run("temaq", 0, {"3": (None, "")})
    unjudged["choices"]["3"]["candidate"] = "model"
    again.replace(unjudged)
    assert not is_judged(again.find("demo", "temaq", 0, (3.0,)))
    assert len(again.runs) == len(RUNS)
    again.forget("heretic")
    assert again.find("demo", "heretic", 0, (3.0,)) is None


def test_results_of_other_conditions_are_not_mixed(tmp_path):
    file = tmp_path / "results.json"
    Results.read(file, {"equal": {"threads": 1}}, {"demo": "abc"}).write()
    with pytest.raises(SystemExit, match="threads = 1, not 2"):
        Results.read(file, {"equal": {"threads": 2}}, {"demo": "abc"})
    with pytest.raises(SystemExit, match="demo has other weights"):
        Results.read(file, {"equal": {"threads": 1}}, {"demo": "xyz"})


def test_unseen_prompts_are_in_no_set_that_a_tool_sees(tmp_path):
    task.write_builtin_prompts(tmp_path)
    for kind in task.KINDS:
        unseen = judge.read_prompts(judge.HERE / f"prompts/unseen_{kind}.txt")
        assert len(set(unseen)) == 100
        for use in task.USES:
            assert not set(unseen) & set(judge.read_prompts(tmp_path / f"{kind}_{use}.txt"))
        for taught in (ROOT / "benchmarks/demo_adapter").glob("*.txt"):
            assert not set(unseen) & set(judge.read_prompts(taught))


@pytest.fixture
def call(models, tmp_path, monkeypatch):
    """Calls the benchmark with a tool that saves a ready model; returns the jobs that it ran."""
    ran = []

    def run_tool(job, asked, words, reserve):
        ran.append((job.tool, job.seed, job.minutes, reserve))
        shutil.copytree(models / "other", asked.folder / "model")
        choice = task.Choice("model", 9.0)
        trials = [trial(n, 2 + n, 0.5 / (1 + n), 5.0 + n) for n in range(3)]

        def export(chosen):
            for of_front in chosen:
                shutil.copytree(models / "other", asked.folder / f"trial{of_front['number']}")

        choices = {m: task.with_front(choice, trials, asked, m, export) for m in job.minutes}
        return {"setup_seconds": 7.0, "trials": []}, choices

    def call_with(*words):
        ran.clear()
        fixed = ["search_quality", "--model", f"demo={models / 'reference'}", "--limit", "4"]
        fixed += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "results.json")]
        fixed += ["--figure", str(tmp_path / "figure.svg")]
        monkeypatch.setattr(sys, "argv", [*fixed, *words])
        command.main()
        return list(ran)

    monkeypatch.setattr(command, "run_tool", run_tool)
    monkeypatch.setattr(command, "tool_version", lambda tool, words: "1")
    return call_with


def test_one_command_runs_what_is_missing_judges_it_and_shows_it(call, tmp_path, capfd):
    python = sys.executable
    first = ("--tools", "heretic", "--heretic", python, "--minutes", "3,6", "--seeds", "0")
    assert call(*first) == [("heretic", 0, (3.0, 6.0), 0.0)]
    content = json.loads((tmp_path / "results.json").read_text())
    (made,) = content["runs"]
    assert [c["judged"]["kl"]["mean"] > 0 for c in made["choices"].values()] == [True, True]
    assert "| demo | 6 | Heretic |" in capfd.readouterr().out
    assert (tmp_path / "figure.svg").exists() and not list((tmp_path / "work").glob("demo-*"))
    assert call(*first) == []
    ours = ("--tools", "heretic-kl-classic", "--minutes", "3", "--seeds", "0", "--reserve", "5")
    assert call(*ours) == [("heretic-kl-classic", 0, (3.0,), 5.0)]
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
    more = ("--tools", "heretic-kl", "--minutes", "3", "--seeds", "0")
    assert call(*more) == [("heretic-kl", 0, (3.0,), 7.0)]  # setup as the run before took


def test_a_mistake_in_the_command_is_one_line(call, capfd):
    with pytest.raises(SystemExit):
        call("--tools", "temaq")
    assert "--tools temaq: there are heretic-kl, heretic-kl-classic" in capfd.readouterr().err
    with pytest.raises(SystemExit):
        call("--model", "demo")
    assert "--model demo: write NAME=FOLDER" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["search_quality", "search_quality_qwen"])
def test_the_comparisons_in_the_guide_are_those_of_the_results_files(name):
    text = (ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8")
    content = json.loads(text)
    tables = table.markdown(content["runs"], content.get("floors", {}))
    guide = (ROOT / "docs/refinement.md").read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n\n{tables}\n\n<!-- end of {name} -->" in guide


def test_the_ways_of_refining_in_the_guide_are_those_of_the_results_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from refinement import rendered

    tables = rendered(json.loads((ROOT / "benchmarks/results/refinement.json").read_text("utf-8")))
    guide = (ROOT / "docs/refinement.md").read_text(encoding="utf-8")
    assert f"<!-- refinement -->\n\n{tables}\n\n<!-- end of refinement -->" in guide
