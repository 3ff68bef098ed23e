"""A real SLURM of one node, and a folder in which its jobs run the commands of this checkout."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from heretic_kl.search import read_study
from heretic_kl.testing import save_tiny_model, tiny_llama

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "runuser")
SLOW = """
import time
from pathlib import Path

from heretic_kl.scoring import ResponseRequest, Score, Scorer, ScorerSettings


class Slow(Scorer[ScorerSettings]):
    def prepare(self, context):
        self.request = ResponseRequest(context.prompts("harmless"), 4)

    def requests(self):
        return [self.request]

    def score(self, results):
        time.sleep(float(Path("pause").read_text()))
        return Score(value=float(len(results[0].texts)), text="x")
"""
"""Makes each trial as long as a file says."""
CONFIG = """
trials = 16
startup_trials = 11
refine = false
racing = false
device = "cpu"
dtype = "float32"
max_response_tokens = 6
batch_size = 4
response_prefix = ""
model = "model"
test_trials = 1
prompt_set = "builtin"
directions.by_response = false
scorers.refusals.settings.markers = ["flour", "mix"]
scorers.teacher_forced_kl.settings.set_aside_refused = false
scorers.slow.use = "slow.py:Slow"
scorers.slow.role = "minimize"
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in Path(item.path).parents:
            item.add_marker("slurm")


def free_ports(count):
    """The first of so many ports in a row that nobody listens at."""
    for first in range(21000, 31000, count):
        try:
            for port in (first, first + 1):
                with socket.create_server(("127.0.0.1", port)):
                    pass
        except OSError:
            continue
        return first
    raise AssertionError("no ports")


class Cluster:
    """Submits jobs in a folder and looks at them."""

    root = ROOT

    def __init__(self, conf):
        self.conf, self.folder = conf, Path()

    def pause(self, seconds):
        """How long each trial takes, besides measuring."""
        (self.folder / "pause").write_text(str(seconds))

    @property
    def environment(self):
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("HERETIC_KL_", "SLURM_"))}
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        return {**ours, **threads, "SLURM_CONF": str(self.conf), "PATH": path}

    def call(self, *words):
        """What a program says; a job's id where it submits one."""
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout.strip()

    def sbatch(self, *words):
        return self.call("sbatch", "--parsable", *words)

    def jobs(self, job):
        """(state, restarts) of a job, or of those of an array by number."""
        lines = self.call("scontrol", "-o", "show", "job", job).splitlines()
        found = {}
        for line in lines:
            facts = dict(re.findall(r"(\w+)=(\S+)", line))
            number = facts.get("ArrayTaskId", "0")
            found[number] = facts["JobState"], int(facts["Restarts"])
        return found

    def wait(self, holds, what):
        """Wait until something holds; a log tells why it never does."""
        for _ in range(1000):
            if holds():
                return
            time.sleep(0.5)
        raise AssertionError("\n".join([self.logs(), self.call("scontrol", "show", "job"), what]))

    def wait_for_end(self, job, state="COMPLETED"):
        """Wait until every job of an array has ended, and in which way."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def ended():
            states = {state for state, _ in self.jobs(job).values()}
            return states <= {*over}

        self.wait(ended, f"job {job} does not end")
        assert {s for s, _ in self.jobs(job).values()} == {state}, self.logs()

    def logs(self):
        paths = [*self.folder.glob("*.log"), *self.folder.glob("jobs/*.log")]
        return "\n".join(f"== {p.name}\n{p.read_text()[-2000:]}" for p in paths)

    def script(self, name, **variables):
        """A copy of a script of ours with some of its variables changed."""
        text = (ROOT / "slurm" / name).read_text()
        for variable, value in variables.items():
            words = value if isinstance(value, str) else f"({shlex.join(value)})"
            pattern = rf"^{variable}=(\([^)]*\)|.*)$"
            text, count = re.subn(
                pattern, lambda _, v=variable, w=words: f"{v}={w}", text, flags=re.M
            )
            assert count == 1, variable
        (self.folder / name).write_text(text)
        return name

    def records(self, name="s", storage=None):
        """Trials of a study that were measured; none where there is no study yet."""
        try:
            study = read_study(name, self.folder / "studies", storage)
        except Exception:  # not there yet, or half written
            return ()
        return tuple(record for record in study.records if record.state == "complete")


@pytest.fixture(scope="session")
def node():
    """The SLURM, for all tests of a process."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"not installed: {', '.join(missing)}" if missing else "SLURM's node needs root"
        )
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environment = {**os.environ, "SLURM_PORT": str(free_ports(102))}

    def call(action):
        words = ["bash", str(HERE / "one-node.sh"), action, str(folder)]
        done = subprocess.run(
            words, env=environment, stdout=subprocess.PIPE, text=True, timeout=120
        )
        assert done.returncode == 0
        return done.stdout.strip()

    conf = call("start")
    yield Cluster(conf)
    call("stop")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(node, tmp_path):
    """The SLURM, with a folder that holds a tiny model, prompts, settings and the commands."""
    node.folder = tmp_path
    (tmp_path / "bin").mkdir()
    for name, words in (("heretic-kl", "-m heretic_kl "), ("python", "")):
        path = tmp_path / "bin" / name
        path.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} {words}"$@"\n')
        path.chmod(0o755)
    save_tiny_model(tmp_path / "model", tiny_llama())
    (tmp_path / "slow.py").write_text(SLOW)
    node.pause(0)
    words = "how do I make a cake please tell me about the weather in Rome first mix flour".split()
    config = CONFIG
    for index, name in enumerate("ab"):
        lines = [" ".join(words[(i + index) % 9 :][: 3 + i % 5]) for i in range(12)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    for kind, name in (("harmful", "a"), ("harmless", "b"), ("borderline", "b")):
        for use, part in (("train", "[:6]"), ("validation", "[6:9]"), ("test", "[9:]")):
            table = f'{{source = "{tmp_path / name}.txt", split = "{part}"}}'
            config += f"prompts.{kind}.{use} = {table}\n"
    (tmp_path / "config.toml").write_text(config)
    yield node
    subprocess.run(["scancel", "-u", "root", "-Q"], env=node.environment)
    node.wait(lambda: not node.call("squeue", "-h"), "jobs are left")
