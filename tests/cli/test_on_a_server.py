"""Commands on a database or a proxy: stopped here, continued there, saved in a third place."""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "search"))

from servers import postgresql, proxy  # noqa: E402

from heretic_kl.cli import main as cli  # noqa: E402
from heretic_kl.search import read_study  # noqa: E402

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX"),
]

PAUSES = """
import time
from pathlib import Path

from heretic_kl.scoring import Score, Scorer, ScorerSettings


class Pauses(Scorer[ScorerSettings]):
    trials = 0

    def requests(self):
        return []

    def score(self, results):
        Pauses.trials += 1
        if Pauses.trials > int(Path(__file__).with_name("most").read_text()):
            time.sleep(300)
        return Score(value=0.0, text="x")
"""
"""A process measures as many edits as a file says, and the next one does not end."""
SEARCH = (
    *("--study-name", "s", "--trials", "12", "--no-screening", "--test-trials", "0"),
    *("--refine", "--refinement.trials", "1", "--refinement.steps", "2"),
)
"""All good starts, in whatever order they are measured, and a trial that the sampler draws."""


ROLE = ("--scorers.pauses.role", "minimize")  # an objective is measured of every trial


@pytest.fixture(scope="module")
def plug_in(workplace):
    (workplace / "pauses.py").write_text(PAUSES)
    (workplace / "most").write_text("1000")
    return ("--scorers.pauses.use", f"{workplace / 'pauses.py'}:Pauses")


def outcome(study):
    """What is the same however often a study was stopped."""
    measured = [record for record in study.records if record.state != "interrupted"]
    return sorted(
        json.dumps([r.state, r.parameters, r.objectives], sort_keys=True) for r in measured
    )


@pytest.fixture(scope="module")
def undisturbed(workplace, plug_in, tmp_path_factory):
    """A study in a journal that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    words = ("--config", str(workplace / "config.toml"), "--study-dir", str(folder))
    assert cli.main([*SEARCH, *plug_in, *ROLE, *words]) == 0
    return outcome(read_study("s", folder))


@contextmanager
def storage(kind, folder):
    database = f"sqlite:///{folder / 'studies.db'}"
    server = postgresql() if kind == "postgresql" else nullcontext(database)
    with server as url:
        yield proxy(url) if kind == "grpc" else url


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "grpc"])
def test_a_search_goes_on_elsewhere_from_the_storage_alone(
    there, plug_in, undisturbed, call, tmp_path, kind
):
    most = there / "most"

    def place(name):
        return ("--storage", url, "--study-dir", str(tmp_path / name))

    def records():
        try:
            return read_study("s", tmp_path, url).records
        except Exception:  # not there yet
            return ()

    with storage(kind, tmp_path) as url:
        most.write_text("3")  # the original model and two trials
        line = [sys.executable, "-m", "heretic_kl", *SEARCH, *plug_in, *ROLE, *place("first")]
        first = subprocess.Popen(
            line, cwd=there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while len(records()) < 2 and first.poll() is None:
            time.sleep(0.2)
        first.send_signal(signal.SIGTERM)
        text = first.communicate(timeout=300)[0]
        most.write_text("1000")
        assert first.returncode == 143, text
        assert [record.state for record in records()].count("complete") == 2, text
        shutil.rmtree(tmp_path / "first")
        code, _, errors = call("worker", "s", *plug_in, *place("second"))
        assert code == 0, errors
        study = read_study("s", tmp_path, url)
        assert outcome(study) == undisturbed
        shutil.rmtree(tmp_path / "second")
        learned = next(record for record in study.records if record.refinement)
        saved = ("--trial", str(learned.number), "--save", str(tmp_path / "model"))
        code, _, errors = call("save", "s", *saved, *plug_in, *place("third"))
        assert code == 0, errors
        assert (tmp_path / "model" / "reproduce.json").exists()
        assert outcome(read_study("s", tmp_path, url)) == undisturbed
