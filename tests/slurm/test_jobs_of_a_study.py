"""`slurm/study.sbatch` on a real SLURM: it ends, whatever happens to its jobs meanwhile."""

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from heretic_kl.search import read_study

sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.machine import library_versions, machine_facts  # noqa: E402


@pytest.fixture
def undisturbed(cluster):
    """What one process without SLURM finds: parameters and values of each trial, and the front."""
    words = [sys.executable, "-m", "heretic_kl", "--study-name", "alone", "--quiet"]
    subprocess.run(words, cwd=cluster.folder, env=cluster.environment, check=True)
    return outcome(read_study("alone", cluster.folder / "studies"))


def outcome(study):
    def texts(records):
        return {json.dumps([record.parameters, record.objectives]) for record in records}

    complete = [record for record in study.records if record.state == "complete"]
    assert len(complete) == len(texts(complete))
    return texts(complete), texts(study.front)


def record(cluster, restarts, study, undisturbed):
    """Write what happened to a study, and whether it ended alike, where SLURM_RECORD names a file.

    Args:
        cluster: of which the jobs were.
        restarts: how often its job was queued again, by cause.
        study: as it ended.
        undisturbed: see `outcome`.
    """
    if (file := os.environ.get("SLURM_RECORD")) is None:
        return
    trials, front = outcome(study)
    slurm = cluster.call("sbatch", "--version").split()[-1]
    content = {
        "command": "make slurm",
        "date": date.today().isoformat(),
        "seed": 0,
        "machine": machine_facts(1),
        "versions": {**library_versions("optuna"), "slurm": slurm},
        "restarts": restarts,
        "trials": len(trials),
        "trials_on_front": len(front),
        "trials_are_those_of_an_undisturbed_study": trials == undisturbed[0],
        "front_is_that_of_an_undisturbed_study": front == undisturbed[1],
    }
    Path(file).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def written(cluster, workers, *flags):
    """The script of `heretic-kl slurm`."""
    words = ("heretic-kl", "slurm", "--workers", str(workers), "--study-name", "s", "--hours", "1")
    cluster.call(*words, "--folder", "jobs", "--quiet", *flags)
    return "jobs/study.sbatch"


def test_an_array_searches_and_saves_behind_the_storage_that_its_first_job_serves(cluster):
    cluster.pause(1)
    script = cluster.folder / written(cluster, 2, "--save", "out", "--pick", "knee")
    database = f"sqlite:///{cluster.folder / 'studies.db'}"
    text = script.read_text().replace("\nSERVE=\n", f"\nSERVE={database}\n")
    script.write_text(text.replace("\nPORT=13000\n", "\nPORT=13731\n"))
    job = cluster.sbatch(str(script))
    cluster.wait(lambda: len(cluster.records(storage=database)) >= 2, "no trials")
    cluster.sbatch("-p", "high", "-n", "2", "--wrap", "srun -n 1 sleep 3")
    cluster.wait(lambda: cluster.jobs(job)["0"][1] == 1, "not requeued: pre-emption")
    cluster.wait_for_end(job)
    study = read_study("s", cluster.folder, database)
    complete = [record for record in study.records if record.state == "complete"]
    assert len(complete) == 16 and study.front and study.tested
    owners = {trial.user_attrs["lease"]["owner"] for trial in study.trials}
    assert len(owners) >= 2
    assert (cluster.folder / "out" / "model.safetensors").exists()


def test_a_study_that_is_stopped_in_every_way_ends_as_an_undisturbed_one(cluster, undisturbed):
    """`scontrol requeue`, a signal, a job before it, its time limit: it goes on each time."""
    cluster.pause(0.5)
    job = cluster.sbatch(written(cluster, 1, "--save", "out", "--pick", "knee"))
    restarts, before = {}, 0

    def happens(what, after, *words, pause=None):
        """Of each start of the job at least one trial is over: its process listens to signals."""
        nonlocal before

        def goes_on():
            running = cluster.jobs(job)["0"][0] == "RUNNING"
            return running and len(cluster.records()) >= max(after, before + 1)

        cluster.wait(goes_on, f"no {after} trials before {what}")
        assert len(cluster.records()) < 16, f"too late for {what}"
        if pause is not None:
            cluster.pause(pause)
        cluster.call(*words)
        restarts[what] = 1
        cluster.wait(lambda: cluster.jobs(job)["0"][1] == len(restarts), f"not requeued: {what}")
        before = len(cluster.records())

    happens("requeue", 2, "scontrol", "requeue", f"{job}_0")
    happens("signal", 4, "scancel", "--signal=TERM", f"{job}_0")
    other = ("sbatch", "--parsable", "-p", "high", "-n", "2", "--wrap", "srun -n 1 sleep 3")
    happens("pre-emption", 6, *other)
    limit = ("scontrol", "update", f"job={job}_0", "timelimit=1")
    happens("time limit", 7, *limit, pause=60)  # limits are looked at twice a minute
    cluster.pause(0)
    cluster.call("scontrol", "update", f"job={job}_0", "timelimit=30")
    cluster.wait_for_end(job)
    study = read_study("s", cluster.folder / "studies")
    record(cluster, restarts, study, undisturbed)
    assert outcome(study) == undisturbed
    assert (cluster.folder / "out" / "model.safetensors").exists()
    saved = cluster.call("scontrol", "requeue", f"{job}_0")  # after all is done: it ends alike
    assert saved == ""
    again = len(restarts) + 1
    cluster.wait(lambda: cluster.jobs(job)["0"][1] == again, "not requeued: after its end")
    cluster.wait_for_end(job)
    assert outcome(read_study("s", cluster.folder / "studies")) == undisturbed


def test_a_cancelled_job_hands_its_trial_back_and_stays_cancelled(cluster):
    cluster.pause(1)
    job = cluster.sbatch(written(cluster, 1))
    cluster.wait(lambda: len(cluster.records()) >= 2, "no trials")
    cluster.call("scancel", job)
    cluster.wait_for_end(job, "CANCELLED")
    records = read_study("s", cluster.folder / "studies").records
    assert {record.state for record in records} == {"complete", "interrupted"}
    assert len(cluster.records()) < 16 and not cluster.call("squeue", "-h", "-j", job)


def test_a_worker_waits_for_a_first_job_that_starts_late(cluster):
    script = cluster.folder / written(cluster, 2)
    text = script.read_text()
    script.write_text(text.replace("WORKER_FLAGS=(", "WORKER_FLAGS=(--wait-minutes=0 "))
    job = cluster.sbatch("--hold", str(script))
    cluster.call("scontrol", "release", f"{job}_1")
    log = cluster.folder / "jobs" / "1.log"
    cluster.wait(lambda: log.exists() and log.read_text().count("no study") > 1, "never waits")
    cluster.call("scontrol", "release", f"{job}_0")
    cluster.wait_for_end(job)
    assert len(cluster.records()) == 16


def test_a_worker_without_a_first_job_says_so_and_ends(cluster):
    script = cluster.folder / written(cluster, 2)
    text = script.read_text()
    script.write_text(text.replace("WORKER_FLAGS=(", "WORKER_FLAGS=(--wait-minutes=0 "))
    cluster.wait_for_end(cluster.sbatch("--array=1", str(script)), "FAILED")
    assert "no study" in cluster.logs()
