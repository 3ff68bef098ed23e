"""optuna-dashboard starts on a study's journal and shows its trials with their notes."""

import json
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from heretic_kl.ablation import Refinement
from heretic_kl.scoring import Score, ScorerSpec, Stopped
from heretic_kl.search import Screened, SearchSpace, SearchStudy, open_storage

pytest.importorskip("optuna_dashboard")
OBJECTIVES = [ScorerSpec(name, name, "minimize", {}) for name in ("refusals", "kl")]
SCORES = {"refusals": Score(0.25, "2/8 (25%)"), "kl": Score(0.5, "0.5000 ± 0.01 nats")}


NO_RESPONSES = Screened({"kl": SCORES["kl"]}, {"refusals": 0.125}, promoted=False)


def search(folder, url, look):
    """Four trials and a refined one; `look` is called while a fifth one is being measured."""
    outcomes = iter(
        [
            SCORES,
            Stopped(0, {"refusals": "at least 7/8"}, (0.8, 0.0)),
            ValueError("no such layer"),
            NO_RESPONSES,
        ]
    )

    def evaluate(edits):
        outcome = next(outcomes, None)
        if outcome is None:
            learned = Refinement("00", 0, 40, "direction", 1, 0.05)
            study.add_refined(study.records[0], learned, SCORES, 1.0)
            look()
            return [SCORES]
        if isinstance(outcome, Exception):
            raise outcome
        return [outcome]

    with open_storage(url, folder, "s") as storage:
        study = SearchStudy(
            storage,
            "s",
            fingerprint={},
            space=SearchSpace(4),
            objectives=OBJECTIVES,
            seed=0,
            startup_trials=9,
        )
        list(study.run(5, evaluate))


def answer(url, seconds=60.0):
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urlopen(url) as response:
                return json.load(response)
        except URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def dashboard(source):
    """What the program shows of the study `s`, started on a journal or a storage URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from optuna_dashboard._cli import main; main()"]
    command += [source, "--port", str(port), "--quiet", "--server", "wsgiref"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        studies = answer(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        (number,) = (entry["study_id"] for entry in studies if entry["study_name"] == "s")
        return answer(f"http://127.0.0.1:{port}/api/studies/{number}")
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_the_dashboard_shows_trials_and_notes_while_the_search_runs(tmp_path, kind):
    url = None if kind == "journal" else f"sqlite:///{tmp_path / 'studies.db'}"
    seen = []
    search(tmp_path, url, lambda: seen.append(dashboard(url or str(tmp_path / "s.journal"))))
    (shown,) = seen
    assert shown["objective_names"] == ["refusals", "kl"]
    states = [trial["state"] for trial in shown["trials"] if trial["state"] != "Waiting"]
    assert states == ["Complete", "Pruned", "Fail", "Complete", "Running", "Complete"]
    notes = [trial["note"]["body"] for trial in shown["trials"] if trial["note"]["body"]]
    assert notes == [
        "- refusals: 2/8 (25%)\n- kl: 0.5000 ± 0.01 nats",
        "- refusals: at least 7/8\n- stopped: trial 0 is better",
        "- error: `ValueError: no such layer`",
        "- kl: 0.5000 ± 0.01 nats\n- refusals: 12% predicted by teacher forcing\n"
        "- screened: no responses were generated",
        "- refusals: 2/8 (25%)\n- kl: 0.5000 ± 0.01 nats\n- refined from trial 0 in 40 steps",
    ]
