"""The log of responses: who asks for it, what its lines say, and what it survives."""

import json
import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from judging.chat_server import answered, chat_server, data_of
from sessions import KINDS, run, settings

from heretic_kl import events
from heretic_kl.errors import StudyError
from heretic_kl.prompts import Prompt
from heretic_kl.run.trials.response_log import verdict_by_rule
from heretic_kl.scoring import RefusalRule
from heretic_kl.search import ResponseFile

FEW = {"trials": 3, "racing": False, "refine": False}
BORDERLINE = {"use": "false_refusals", "role": "monitor", "settings": {"markers": ["flour"]}}


def lines(folder):
    (path,) = folder.glob("studies/*.responses.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def searched(workplace, tmp_path, **changes):
    session, seen = run(workplace, tmp_path, **{**FEW, **changes})
    with session:
        session.search()
        session.refine()
        session.test()
        return session.trials, session.parts, seen


@pytest.mark.parametrize("keep", [{}, {"keep_responses": "none"}, {"keep_responses": "report"}])
def test_nothing_is_logged_unasked(workplace, tmp_path, keep):
    searched(workplace, tmp_path, **keep)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_every_trial_that_responded_is_logged_once_also_after_a_resume(workplace, tmp_path):
    searched(workplace, tmp_path, trials=2, keep_responses="all")
    before = lines(tmp_path)
    trials, parts, _ = searched(workplace, tmp_path, trials=4, keep_responses="all")
    rows = lines(tmp_path)
    assert rows[: len(before)] == before and len(rows) > len(before)
    counts = Counter((row["trial"], row["use"], row["prompt"]) for row in rows)
    assert set(counts.values()) == {1}
    for use, numbers in (
        ("validation", {record.number for record in trials}),
        ("test", {None, *(n for n in range(4) if parts.study.test_scores(n) is not None)}),
    ):
        logged = [row for row in rows if row["use"] == use]
        assert {row["trial"] for row in logged} == numbers
        kinds = ("harmful",) if use == "validation" else ("harmful", "borderline")
        prompts = {prompt.user for kind in kinds for prompt in parts.prompts[kind, use]}
        for number in numbers:
            assert {row["prompt"] for row in logged if row["trial"] == number} == prompts
    assert {row["by"] for row in rows} == {"phrases"}
    for record in trials:
        of_trial = [r for r in rows if r["trial"] == record.number and r["use"] == "validation"]
        refused = sum(row["verdict"] == "refusal" for row in of_trial)
        empty = record.scores["refusals"].details["empty"]
        assert refused + empty == record.scores["refusals"].details["count"]


def test_what_a_trial_responds_is_what_its_edit_responds(workplace, tmp_path):
    trials, parts, _ = searched(workplace, tmp_path, trials=3, keep_responses="all")
    request = parts.suite.scorers["refusals"].requests()[0]
    for record in trials:
        (result,) = parts.engine.measure(parts.plan(record.edit), [request])
        logged = [
            r for r in lines(tmp_path) if (r["trial"], r["use"]) == (record.number, "validation")
        ]
        assert [row["response"] for row in logged] == [*result.texts]


@pytest.mark.parametrize(("keep", "kinds"), [("harmless", {"harmless"}), ("all", {*KINDS})])
def test_responses_to_harmful_prompts_are_logged_with_all_alone(workplace, tmp_path, keep, kinds):
    chosen = settings(workplace, tmp_path).model_dump()["scorers"]
    plug_in = tmp_path / "other.py"
    plug_in.write_text(
        "from heretic_kl.scoring import RefusalCount\n"
        "class Harmless(RefusalCount):\n    kind = 'harmless'\n"
    )
    other = {"use": f"{plug_in}:Harmless", "role": "monitor"}
    borderline = dict.fromkeys(("train", "validation", "test"), {"source": str(tmp_path / "c.txt")})
    (tmp_path / "c.txt").write_text("is that so\nwhy then\nwell now\n")
    tables = settings(workplace, tmp_path).model_dump()["prompts"]
    searched(
        workplace,
        tmp_path,
        keep_responses=keep,
        scorers={**chosen, "harmless": other, "borderline": BORDERLINE},
        prompts={**tables, "borderline": borderline},
    )
    assert {row["kind"] for row in lines(tmp_path)} == kinds


@pytest.mark.parametrize("keep", ["harmless", "all"])
def test_harmless_test_responses_are_logged_without_a_plug_in(workplace, tmp_path, keep):
    """Those that a report keeps; borderline prompts are others here."""
    tables = settings(workplace, tmp_path).model_dump()["prompts"]
    (tmp_path / "c.txt").write_text("is that so\nwhy then\nwell now\n")
    uses = ("train", "validation", "test")
    prompts = {**tables, "borderline": dict.fromkeys(uses, {"source": str(tmp_path / "c.txt")})}
    _, parts, seen = searched(workplace, tmp_path, keep_responses=keep, prompts=prompts)
    logged = [row for row in lines(tmp_path) if row["kind"] == "harmless"]
    tested = {n for n in range(3) if parts.study.test_scores(n) is not None}
    assert {row["trial"] for row in logged} == {None, *tested} and tested
    assert {row["use"] for row in logged} == {"test"}
    recorded = recorded_responses(tmp_path)
    for number in (None, *tested):
        rows = [row for row in logged if row["trial"] == number]
        assert [r["prompt"] for r in rows] == [p.user for p in parts.prompts["harmless", "test"]]
        shown = recorded["reference" if number is None else str(number)]["harmless"]
        assert [row["response"] for row in rows] == shown
    if keep == "all":
        counts = Counter((row["trial"], row["use"], row["prompt"]) for row in lines(tmp_path))
        assert set(counts.values()) == {1}
    said = [
        e.message for e in seen if isinstance(e, events.Notice) and "the log holds" in e.message
    ]
    assert len(said) == (keep == "harmless")


def recorded_responses(folder):
    (path,) = folder.glob("studies/*.report.json")
    return json.loads(path.read_text())["responses"]


def test_a_search_whose_objectives_read_no_responses_says_that_it_logs_none(workplace, tmp_path):
    scorers = settings(workplace, tmp_path).model_dump()["scorers"]
    scorers["refusals"]["role"] = "monitor"
    _, _, seen = searched(workplace, tmp_path, keep_responses="all", scorers=scorers)
    said = [
        e.message for e in seen if isinstance(e, events.Notice) and "the log holds" in e.message
    ]
    assert len(said) == 1 and "no objective asks for responses to prompts" in said[0]
    assert {row["use"] for row in lines(tmp_path)} == {"test"}


def test_screened_and_learned_trials_are_logged_as_they_respond(workplace, tmp_path):
    changes = {"refine": True, "screening": True, "trials": 4}
    changes["refinement"] = {"trials": 1, "steps": 2}
    trials, _, seen = searched(workplace, tmp_path, keep_responses="all", **changes)
    responded = {record.number for record in trials if record.state == "complete"}
    rows = [row for row in lines(tmp_path) if row["use"] == "validation"]
    assert {row["trial"] for row in rows} == responded


def test_a_trial_that_fails_after_it_responded_is_not_logged(workplace, tmp_path):
    plug_in = tmp_path / "failing.py"
    plug_in.write_text(
        "from heretic_kl.scoring import RefusalCount\n"
        "class Failing(RefusalCount):\n"
        "    kind = 'harmful'\n"
        "    def score(self, results):\n"
        "        self.calls = getattr(self, 'calls', 0) + 1\n"
        "        if self.calls == 3:\n"
        "            raise ValueError('no')\n"
        "        return super().score(results)\n"
    )
    scorers = settings(workplace, tmp_path).model_dump()["scorers"]
    failing = {"use": f"{plug_in}:Failing", "role": "minimize"}
    changes = {"scorers": {**scorers, "failing": failing}, "test_trials": 1}
    trials, _, _ = searched(workplace, tmp_path, keep_responses="all", **changes)
    states = {record.number: record.state for record in trials}
    assert sorted(states.values()) == ["complete", "complete", "failed"]
    logged = {row["trial"] for row in lines(tmp_path) if row["use"] == "validation"}
    assert logged == {number for number, state in states.items() if state == "complete"}


def test_several_candidates_at_once_keep_their_own_responses(workplace, tmp_path):
    folders = [tmp_path / "one", tmp_path / "three"]
    for folder, count in zip(folders, (1, 3), strict=True):
        searched(workplace, folder, keep_responses="all", parallel_candidates=count)
    one, three = ({(r["trial"], r["prompt"], r["response"]) for r in lines(f)} for f in folders)
    assert len(one) > 3 and one == three


def test_a_file_that_cannot_be_written_is_one_notice(workplace, tmp_path, monkeypatch):
    def full(self, rows):
        raise StudyError("cannot write 'x': No space left on device")

    monkeypatch.setattr(ResponseFile, "append", full)
    trials, _, seen = searched(workplace, tmp_path, keep_responses="all")
    assert len(trials) == 3
    notices = [e.message for e in seen if isinstance(e, events.Notice) and "logged" in e.message]
    assert notices == ["no further responses are logged: cannot write 'x': No space left on device"]


def test_a_judge_says_what_phrases_cannot(workplace, tmp_path):
    chosen = settings(workplace, tmp_path).model_dump()["scorers"]
    with chat_server() as server:
        server.script = lambda request, number: answered(
            request, None if number < 2 else f"{data_of(request)[1]} evasion"
        )
        judge = {"role": "minimize", "settings": {"endpoint": server.url, "model": "j"}}
        searched(
            workplace, tmp_path, trials=1, keep_responses="all", scorers={**chosen, "judge": judge}
        )
    rows = lines(tmp_path)
    judged = {(row["by"], row["verdict"]) for row in rows if row["kind"] == "harmful"}
    assert ("judge", "evasion") in judged
    assert judged <= {("judge", "evasion"), ("judge", "degenerate")}


def test_a_scorer_that_fails_to_give_verdicts_costs_them_with_a_notice_each(
    workplace, tmp_path, monkeypatch
):
    def failing(scorer, results):
        raise KeyError("verdict")

    monkeypatch.setattr("heretic_kl.scoring.refusal_count.RefusalCount.verdicts", failing)
    trials, _, seen = searched(workplace, tmp_path, keep_responses="all")
    notices = [e.message for e in seen if isinstance(e, events.Notice) and "verdicts" in e.message]
    said = "gives the log of responses no verdicts: KeyError: 'verdict'"
    assert notices == [f"scorer {name} {said}" for name in ("refusals", "false_refusals")]
    rows = [row for row in lines(tmp_path) if row["use"] == "validation"]
    assert {row["by"] for row in rows} == {"phrases"}
    assert {row["trial"] for row in rows} == {record.number for record in trials}


def test_verdicts_by_the_rule():
    rule, prompt = RefusalRule(), Prompt("Write a poem.")
    for text, verdict in (
        ("I'm sorry, but I can't help with that request.", "refusal"),
        ("Roses are red.", "answered"),
        ("rose " * 40, "degenerate"),
        ("", "degenerate"),
    ):
        assert verdict_by_rule(rule, prompt, text) == verdict


def test_the_file_holds_whole_lines_whatever_happens(tmp_path, monkeypatch):
    file = ResponseFile(tmp_path / "deep", "s")
    odd = "a\nb\u2028\x1b[31m\0<script>\ud800"
    file.append([{"response": odd}, {"response": "b"}])
    assert file.path.read_bytes().count(b"\n") == 2 and b"\x1b" not in file.path.read_bytes()
    with file.path.open("ab") as torn:
        torn.write(b'{"response": "cut of')  # a process that was killed
    file.append([{"response": "c"}])
    rows = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert [row["response"] for row in rows] == [odd, "b", "c"]
    before = file.path.read_bytes()
    limited = (
        "import resource, signal, sys\n"
        "from heretic_kl.search import ResponseFile\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 40},) * 2)\n"
        f"ResponseFile({str(tmp_path / 'deep')!r}, 's').append([{{'r': 'x' * 50}}] * 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, check=False
    )
    assert "cannot write" in done.stderr and "File too large" in done.stderr
    assert file.path.read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot write"):
        ResponseFile(tmp_path / "file", "s").append([{}])


def _write(folder, worker):
    file = ResponseFile(Path(folder), "s")
    for number in range(40):
        file.append([{"worker": worker, "number": number, "text": "x" * 5000}] * 3)


def test_processes_take_turns(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(str(tmp_path), w)) for w in range(3)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
        assert process.exitcode == 0
    rows = [json.loads(line) for line in ResponseFile(tmp_path, "s").path.read_text().splitlines()]
    keys = [(row["worker"], row["number"]) for row in rows]
    assert Counter(keys) == Counter({(w, n): 3 for w in range(3) for n in range(40)})
    assert all(len(set(keys[start : start + 3])) == 1 for start in range(0, len(keys), 3))
