"""`heretic-kl worker`, `--workers` and `storage serve`, as a user sees them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import pytest

from heretic_kl.cli.workers import local, worker
from heretic_kl.config import Settings, read_settings
from heretic_kl.search import read_study


@pytest.fixture
def passing_change(there, searched, tmp_path):
    """Afterwards the studies are as other tests expect them."""
    shutil.copytree(there / "studies", tmp_path / "studies")
    yield
    shutil.rmtree(there / "studies")
    shutil.copytree(tmp_path / "studies", there / "studies")


def test_a_worker_runs_more_trials_with_the_settings_of_the_study(there, passing_change, call):
    before = read_study("mine", there / "studies")
    code, _, errors = call("worker", "mine", "--trials", "6", "--threads", "1")
    assert code == 0, errors
    after = read_study("mine", there / "studies")
    assert len(after.records) == 6
    assert after.settings == before.settings  # those of the run that began it


def test_a_worker_with_other_settings_is_refused_with_the_difference(there, searched, call):
    code, _, errors = call("worker", "--study", "mine", "--kl-tokens", "2", "--seed", "5")
    assert code == 1
    assert "(kl_tokens: 3 there, 2 here" in errors and "seed: 0 there, 5 here" in errors


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "say which study: heretic-kl worker --study NAME"),
        (("gone",), 1, "there is no study 'gone' in 'studies'"),
        (("mine", "--storage", "grpc://"), 1, "write grpc://HOST:PORT"),
    ],
)
def test_a_worker_without_a_study_is_one_line(there, searched, call, words, code, message):
    ended = call("worker", *words, "--wait-minutes", "0")
    assert ended[0] == code and message in ended[2]


def test_a_worker_waits_for_a_study_that_is_not_there_yet(there, searched, call, monkeypatch):
    journal = there / "studies" / "mine.journal"
    away = journal.with_name("away")
    journal.rename(away)
    monkeypatch.setattr(worker.time, "sleep", lambda seconds: away.rename(journal))
    code, out, errors = call("worker", "mine", "--quiet")
    assert code == 0, errors
    assert "there is no study" in out + errors and "waiting for it" in out + errors


def test_no_plug_in_is_run_because_a_study_names_it(there, call):
    plug_in = there / "short.py"
    plug_in.write_text(
        "from heretic_kl.scoring import ResponseRequest, Score, Scorer, ScorerSettings\n"
        "class Short(Scorer[ScorerSettings]):\n"
        "    def prepare(self, context):\n"
        "        self.request = ResponseRequest(context.prompts('harmless'), 4)\n"
        "    def requests(self):\n"
        "        return [self.request]\n"
        "    def score(self, results):\n"
        "        return Score(value=float(len(results[0].texts)), text='x')\n"
    )
    flags = ("--scorers.short.use", f"{plug_in}:Short", "--scorers.short.role", "monitor")
    assert call("--study-name", "plugged", "--trials", "1", *flags)[0] == 0
    code, _, errors = call("worker", "plugged")
    assert code == 2
    assert "uses the scorer plug-in" in errors and "--scorers.short.use FILE.py:CLASS" in errors
    assert call("worker", "plugged", *flags)[0] == 0
    save = ("save", "plugged", "--trial", "0", "--save", "plugged-model")
    code, _, errors = call(*save)
    assert code == 2 and "--scorers.short.use FILE.py:CLASS" in errors
    assert call(*save, *flags[:2])[0] == 0


def test_gpus_are_taken_in_turn_and_threads_are_shared(monkeypatch):
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 2)
    assert [s.device for s in local.shares(Settings(workers=3))] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [s.device for s in local.shares(Settings(workers=0))] == ["cuda:0", "cuda:1"]
    spread = Settings(workers=2, device_map="auto", threads=8)
    assert local.shares(spread) == [local.Share("auto", 4)] * 2
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 0)
    assert local.shares(Settings(workers=0, threads=8)) == [local.Share("auto", 8)]
    assert [s.threads for s in local.shares(Settings(workers=3, threads=2))] == [1, 1, 1]


def kept(there):
    settings = read_study("shared", there / "studies").settings
    return settings["device"], settings["threads"], settings.get("workers")


@pytest.fixture
def shared(there, call, monkeypatch):
    """A study of two workers, which had all threads together."""
    threads = local.torch.get_num_threads()
    monkeypatch.setattr(local, "shares", lambda settings: [local.Share("cpu", 1)])
    words = ("--study-name", "shared", "--trials", "1", "--workers", "2")
    code, _, errors = call(*words, "--device", "auto", "--threads", str(os.cpu_count()))
    assert code == 0, errors
    yield
    local.torch.set_num_threads(threads)
    (there / "studies" / "shared.journal").unlink()


def test_a_study_keeps_what_the_user_named_and_no_worker_s_share(there, shared, call):
    assert kept(there) == ("auto", os.cpu_count(), None)
    assert call("worker", "shared")[0] == 0
    assert call("save", "shared", "--trial", "0", "--save", "of-two", "--threads", "1")[0] == 0
    assert kept(there) == ("auto", 1, None)  # as the user named them last


def test_what_only_another_machine_has_is_left_to_it(there, shared, call, check_lines):
    """Device and threads are those of this machine, and stay in the study as they are."""
    journal = there / "studies" / "shared.journal"
    text = journal.read_text().replace(r"\"device\": \"auto\"", r"\"device\": \"cuda:7\"")
    threads = rf"\"threads\": {os.cpu_count()}"
    journal.write_text(text.replace(threads, r"\"threads\": 1000"))
    assert kept(there) == ("cuda:7", 1000, None)
    save = ("save", "shared", "--trial", "0", "--save", "of-another")
    for words in (("worker", "shared", "--trials", "2"), save):
        code, out, errors = call(*words, "--json")
        assert code == 0, errors
        (loaded,) = (line for line in check_lines(out) if line["event"] == "model_loaded")
        assert loaded["device"] != "cuda:7"
    assert kept(there) == ("cuda:7", 1000, None)
    code, _, errors = call("worker", "shared", "--device", "cuda:7")
    assert code == 2 and "device 'cuda:7' cannot be used" in errors


def test_a_worker_starts_more_workers_with_its_own_flags(there, passing_change, call, monkeypatch):
    started = []

    def start(settings, study, share, errors, flags):
        started.append((study, share, flags))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(local, "_start", start)
    threads = local.torch.get_num_threads()
    words = ("--study", "mine", "--trials", "5", "--workers", "3", "--threads", "3")
    code, _, errors = call("worker", *words)
    assert local.torch.get_num_threads() == 3
    local.torch.set_num_threads(threads)
    assert code == 0, errors
    assert started == [("mine", local.Share("cpu", 1), list(words))] * 2


def test_helpers_get_what_a_study_may_not_say(monkeypatch):
    started = []
    monkeypatch.setattr(local.subprocess, "Popen", lambda words, **others: started.extend(words))
    tasks = {"use": "lm_eval", "settings": {"task": "mine", "tasks": "my tasks"}}
    judge = {"settings": {"endpoint": "http://here/v1", "key_variable": "KEY", "model": "j"}}
    scorers = {"mine": tasks, "odd": {"use": "odd.py:Odd"}, "judge": judge}
    local._start(Settings(scorers=scorers), "s", local.Share("cpu", 1), sys.stderr)
    assert {
        "--scorers.mine.settings.tasks=my tasks",
        "--scorers.odd.use=odd.py:Odd",
        "--scorers.judge.settings.endpoint=http://here/v1",
        "--scorers.judge.settings.key_variable=KEY",
    } < {*started}
    assert not any("model=j" in word for word in started)


@pytest.mark.parametrize(
    "changes", [{}, {"refine": False}, {"screening": False}, {"refinement": {"trials": 0}}]
)
def test_helpers_learn_nothing_and_screen_as_their_study_does(monkeypatch, changes):
    started, settings = [], Settings(**changes)
    monkeypatch.setattr(local.subprocess, "Popen", lambda words, **others: started.extend(words))
    local._start(settings, "s", local.Share("cpu", 1), sys.stderr)
    stored = settings.model_dump(mode="json")
    theirs = read_settings(worker.WorkerSettings, started[4:], stored=stored)
    assert not theirs.learns and theirs.screens == settings.screens


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(("command", "flag"), [("optimize", "--refine"), ("worker", "--no-refine")])
def test_two_workers_search_and_hand_back_what_they_run_when_terminated(there, call, command, flag):
    """Both measure several trials. TERM to the first one ends both, and leaves no trial running."""
    search = ["--study-name", "two", "--startup-trials", "100000", "--keep-responses", "all", flag]
    if command == "worker":
        assert call(*search, "--trials", "0")[0] == 0
        search = ["two"]
    words = [sys.executable, "-m", "heretic_kl", command, *search]
    words += ["--workers", "2", "--trials", "100000"]
    process = subprocess.Popen(
        words,
        cwd=there,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    journal, pause = there / "studies" / "two.journal", threading.Event()
    owners: Counter[str] = Counter()
    try:
        for _ in range(3000):
            text = journal.read_text() if journal.exists() else ""
            lines = text.splitlines()
            trials = [line for line in lines if '"params"' in line or '"state":0' in line]
            begun = (line.partition('"owner":"')[2].partition('"')[0] for line in trials)
            owners = Counter(o for o in begun if o and f":{os.getpid()}." not in o)
            if (len(owners) == 2 and min(owners.values()) > 2) or process.poll() is not None:
                break
            pause.wait(0.1)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=300)[1]
        assert len(owners) == 2 and min(owners.values()) > 2, errors
        assert process.returncode == 143, errors
        for owner in owners:
            number = int(owner.rpartition(":")[2].partition(".")[0])
            with pytest.raises(ProcessLookupError):
                os.kill(number, 0)
    finally:  # both workers are in one group
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    records = read_study("two", there / "studies").records
    journal.unlink()
    states = {record.state for record in records}
    assert "complete" in states and states <= {"complete", "screened", "interrupted"}
    log = journal.with_name("two.responses.jsonl").read_text().splitlines()
    journal.with_name("two.responses.jsonl").unlink()
    lines = [(row["trial"], row["prompt"]) for row in map(json.loads, log)]
    assert len(lines) == len({*lines}), "no trial is logged twice"
    complete = {record.number for record in records if record.state == "complete"}
    logged = {number for number, _ in lines}
    assert logged <= complete and len(complete - logged) <= 2, "but those that ended at TERM"


def test_workers_that_do_not_end_have_ten_seconds_together(monkeypatch):
    """Each is waited for until the same moment, and then killed."""
    words = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    )
    popen = subprocess.Popen

    def start(settings, study, share, errors, flags):
        process = popen([sys.executable, "-c", f"{words}; time.sleep(600)"], stdout=subprocess.PIPE)
        with process.stdout:
            assert process.stdout.readline()
        started.append(process)
        return process

    started, waits = [], []
    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(local, "STOP_SECONDS", 0.5)
    waited = local._wait
    monkeypatch.setattr(local, "_wait", lambda *words: waits.append(words[1]) or waited(*words))
    session = SimpleNamespace(parts=SimpleNamespace(study=SimpleNamespace(name="s")))
    with local.helpers(Settings(workers=3, device="cpu"), session, lambda event: None):
        pass
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2
    assert len(set(waits)) == 1


def test_storage_serve_without_a_database_is_one_line(call):
    assert "heretic-kl storage serve --storage URL" in call("storage")[2]
    assert "name the database" in call("storage", "serve")[2]
    code, _, errors = call("storage", "serve", "--storage", "studies.db")
    assert code == 1 and "not a URL" in errors
