"""`heretic-kl slurm`: the batch script of a study."""

import re
import shlex
import shutil
import socket
import stat
import subprocess

import pytest

from heretic_kl.cli.scorer import TEMPLATE
from heretic_kl.cli.workers import slurm
from heretic_kl.config import load_settings

WORDS = ("slurm", "--workers", "3", "--folder", "jobs", "--study-name", "a b", "--trials", "7")


def lines(there):
    return (there / "jobs" / "study.sbatch").read_text(encoding="utf-8").splitlines()


def test_the_script_says_what_the_settings_say(there, call):
    url = "postgresql+psycopg://me:secret@host/db"
    more = ("--partition", "long", "--gpus", "2", "--hours", "5", "--storage", url)
    code, _, errors = call(*WORDS, *more, "--scorers.refusals.settings.markers", '["no, \\"x\\""]')
    assert code == 0, errors
    text = lines(there)
    for line in (
        "#SBATCH --array=0-2",
        "#SBATCH --partition=long",
        "#SBATCH --gpus-per-task=2",
        "#SBATCH --time=5:00:00",
        "#SBATCH --requeue",
        "STUDY='a b'",
        f"STORAGE={url}",
    ):
        assert line in text
    assert stat.S_IMODE((there / "jobs" / "study.sbatch").stat().st_mode) == 0o600
    settings = load_settings(["--config", "jobs/settings.toml"])
    assert settings.trials == 7 and settings.workers == 1 and settings.storage is None
    assert settings.model == str(there / "model")
    assert settings.scorers["refusals"].settings["markers"] == ['no, "x"']


def test_the_other_scripts_say_it_too(there, call):
    more = ("--cpus", "4", "--hours", "5", "--gpus", "1", "--storage", "postgresql+psycopg://h/db")
    code, out, errors = call(*WORDS, *more, "--quantization", "bnb_4bit", "--pick", "trial=2")
    assert code == 0 and "GPUs" not in out + errors
    sweep, loss, node = (
        (there / "jobs" / name).read_text(encoding="utf-8").splitlines()
        for name in ("sweep.sbatch", "training-loss.sbatch", "setup-node.sh")
    )
    for script in (sweep, loss):
        assert {"#SBATCH --cpus-per-task=4", "#SBATCH --time=5:00:00"} <= {*script}
        assert "#SBATCH --gpus-per-task=1" in script
    assert {"SEARCH=(--config jobs/settings.toml)", "STUDY_DIR=jobs/sweep"} <= {*sweep}
    assert {"PICK=trial=2", "STORAGE=postgresql+psycopg://h/db"} <= {*sweep}
    assert {"FLAGS=(--threads 4)", "FOLDER=jobs/training-loss"} <= {*loss}
    assert "EXTRAS=postgresql,grpc,bnb" in node
    assert stat.S_IMODE((there / "jobs" / "setup-node.sh").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("words", "said"), [((), True), (("--device-map", "auto"), False), (("--gpus", "1"), False)]
)
def test_gpus_that_no_process_uses_are_noticed(there, call, words, said):
    code, out, errors = call(*WORDS, "--gpus", "2", *words)
    assert code == 0
    assert ("each job asks for 2 GPUs and uses one" in out + errors) is said


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize("name", slurm.SCRIPTS)
def test_scripts_are_shell(name):
    subprocess.run(["bash", "-n", str(slurm.script_folder() / name)], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(("task", "expected"), [("0", "--config"), ("2", "worker")])
def test_each_job_of_the_array_runs_its_command(there, call, tmp_path, task, expected):
    (there / "my scorer.py").write_text(TEMPLATE, encoding="utf-8")
    plug_in = ("--scorers.mine.use", "my scorer.py:NewScorer", "--trust-remote-code")
    assert call(*WORDS, *plug_in)[0] == 0
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"SLURM_ARRAY_TASK_ID": task, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    out = subprocess.run(
        ["bash", "jobs/study.sbatch"], env=environment, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert out[:2] == ["heretic-kl", expected] and "a b" in out and "studies" in out
    unsaid = {"--trust-remote-code", "--scorers.mine.use=my scorer.py:NewScorer"}
    assert (unsaid <= {*out}) is (expected == "worker")


@pytest.fixture
def script(there, call, tmp_path):
    """(variables, changes to the script) -> the first job, with programs that print their words."""
    assert call(*WORDS)[0] == 0
    commands = {"srun": 'printf "%s\\n" "$@"', "heretic-kl": 'exit "$TRIALS_CODE"'}
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
        (tmp_path / name).chmod(0o755)

    def run(variables, **changes):
        path = there / "jobs" / "study.sbatch"
        text = path.read_text(encoding="utf-8")
        for name, value in changes.items():
            text = re.sub(rf"(?m)^{name}=.*$", f"{name}={value}", text)
        path.write_text(text, encoding="utf-8")
        environment = {"SLURM_ARRAY_TASK_ID": "0", "PATH": f"{tmp_path}:/usr/bin:/bin", **variables}
        words = ["bash", "jobs/study.sbatch"]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("restarts", "trials_code", "overwrites"),
    [("0", "0", False), ("1", "1", False), ("1", "0", True)],
)
def test_only_a_restart_with_a_study_may_overwrite(script, restarts, trials_code, overwrites):
    out = script({"SLURM_RESTART_COUNT": restarts, "TRIALS_CODE": trials_code}).stdout
    assert ("--overwrite" in out) is overwrites and "--config" in out


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_first_job_adopts_no_other_server(script, tmp_path):
    (tmp_path / "hostname").write_text("#!/bin/bash\necho 127.0.0.1\n")
    (tmp_path / "hostname").chmod(0o755)
    changes = {"SERVE": "sqlite:///x.db", "STUDY_DIR": shlex.quote(str(tmp_path / "studies"))}
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = script({}, **changes, PORT=port)
    assert done.returncode == 1 and "choose another PORT" in done.stderr and not done.stdout
    assert not list(tmp_path.glob("studies/*.address"))
    done = script({"TRIALS_CODE": "1"}, PORT=port)
    assert done.returncode == 1 and not done.stdout  # its own server ended at once
    assert not list(tmp_path.glob("studies/*.address"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--workers", "0"), "say how many jobs"),
        (("--save", "out"), "--save on a cluster needs --pick"),
        (("--folder", "a.txt/jobs"), "cannot write 'a.txt/jobs'"),
    ],
)
def test_what_cannot_be_written_is_one_line(there, call, words, message):
    code, _, errors = call("slurm", *words)
    assert code in (1, 2) and message in errors and len(errors.splitlines()) == 1


def test_without_sbatch_the_script_is_left_to_submit(there, call, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, _, errors = call(*WORDS, "--submit")
    assert code == 1 and "there is no sbatch on this machine: submit jobs/study.sbatch" in errors
