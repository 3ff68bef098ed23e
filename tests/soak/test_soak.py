"""Hours of kills, full disks, lost databases, jumping clocks; what was reported finished is there.

`make soak` runs it for `SOAK_MINUTES` (120), of some kinds alone by `SOAK_KINDS`. Each round is one
study of three workers, on a journal
file, on SQLite, on a small disk that fills up, or on PostgreSQL, which is stopped and started at
random moments. What this machine cannot do is named at the beginning and at the end. Workers are
killed (kill -9) at random moments, some live days ahead of the others or behind them, and all of
them keep learned edits and save models as they go. The seed of each round is printed.
"""

import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from sqlalchemy.exc import SQLAlchemyError

from heretic_kl.ablation import Operator, SiteKey
from heretic_kl.errors import HereticKLError
from heretic_kl.export import save_merged
from heretic_kl.model import ModelSource, load_model
from heretic_kl.scoring import Score, ScorerSpec
from heretic_kl.search import PlanStore, SearchSpace, SearchStudy, open_storage, quiet_optuna
from heretic_kl.testing import save_tiny_model, tiny_llama

sys.path.append(str(Path(__file__).parents[1] / "search"))

from servers import postgresql_server  # noqa: E402

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif("SOAK_MINUTES" not in os.environ, reason="set SOAK_MINUTES, or make soak"),
    pytest.mark.filterwarnings("always:NOT TESTED"),
]
MINUTES = float(os.environ.get("SOAK_MINUTES", "120"))
PROCESSES = multiprocessing.get_context("forkserver")
"""Forks from a process that has run nothing yet: in a later fork torch's autograd hangs."""
PROCESSES.set_forkserver_preload(["test_soak"])
JOIN_SECONDS = 600
WORKERS, TRIALS, KILLS, PAUSE = 3, 40, 12, 0.7
DAY = 86_400.0
SPACE = SearchSpace(layers=12)
OBJECTIVES = (ScorerSpec("refusals", "refusals", "minimize", {}),)
PLACES = ("journal", "sqlite", "full disk", "lost database")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that all workers save edited."""
    return loaded(save_tiny_model(tmp_path_factory.mktemp("soak") / "model", tiny_llama()))


@cache
def loaded(folder):
    return load_model(ModelSource(str(folder)), dtype="float32", device="cpu")


@pytest.fixture
def database():
    """A PostgreSQL that is stopped and started, where it is installed."""
    with ExitStack() as stack:
        try:
            server = stack.enter_context(postgresql_server())
        except pytest.skip.Exception:
            server = None
        yield server


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True).returncode:
        yield None
        return
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_soak(model, tmp_path, small_disk, database):
    quiet_optuna()
    end, rounds, losses = time.monotonic() + 60 * MINUTES, Counter(), 0
    why = {"full disk": "no disk can be mounted here", "lost database": "no PostgreSQL"}
    unable = [
        kind for kind in why if not {"full disk": small_disk, "lost database": database}[kind]
    ]
    skipped = "; ".join(f"NOT TESTED: {kind} ({why[kind]})" for kind in unable)
    print(f"\n{skipped or 'every kind is tested'}", flush=True)
    only = os.environ.get("SOAK_KINDS", ",".join(PLACES)).split(",")
    kinds = [kind for kind in PLACES if kind not in unable and kind in only]
    assert kinds, f"SOAK_KINDS names none of {', '.join(PLACES)} that can be tested here"
    for kind, seed in zip(itertools.cycle(kinds), itertools.count()):
        if time.monotonic() > end:
            break
        folder = (small_disk if kind == "full disk" else tmp_path) / f"round{seed}"
        folder.mkdir()
        print(f"round {seed}: {kind}", flush=True)
        losses += one_round(model, kind, folder, seed, database)
        rounds[kind] += 1
    assert rounds
    print(f"{dict(rounds)}; the database was lost {losses} times; {skipped or 'nothing left out'}")
    if skipped:
        warnings.warn(skipped, UserWarning, stacklevel=1)


def one_round(model, kind, folder, seed, database):
    """One study to its end through kills, then every check; how often its database was lost."""
    urls = {"sqlite": f"sqlite:///{folder / 'studies.db'}"}
    if kind == "lost database":
        urls[kind] = database.url
    name = f"s{seed}"
    place, chance = (urls.get(kind), folder, name), random.Random(seed)
    children, losses = [], 0
    report = reporting(folder)
    for _ in range(KILLS):
        while len(children) < WORKERS:
            jump = chance.choice([0.0, 0.0, 3 * DAY, -3 * DAY])
            life = (model.source.folder, place, folder, report, jump, chance.random())
            children.append(PROCESSES.Process(target=worker, args=life))
            children[-1].start()
        trouble = {"full disk": lambda: filled(folder), "lost database": lambda: lost(database)}
        troubled = kind in trouble and chance.random() < 0.5
        losses += troubled and kind == "lost database"
        with trouble[kind]() if troubled else ExitStack():
            time.sleep(chance.expovariate(1 / PAUSE))
        victim = children.pop(chance.randrange(len(children)))
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
        victim.join()
    for child in children:
        child.join(JOIN_SECONDS)
        assert child.exitcode is not None, "a worker does not end"
    with open_storage(*place) as storage:
        opened = study(storage, name)
        list(opened.run(TRIALS, measured))
        check_study(opened, folder)
    check_artifacts(folder, name)
    check_models(model, folder)
    return losses


def study(storage, name):
    return SearchStudy(
        storage,
        name,
        fingerprint={"model": "m"},
        space=SPACE,
        objectives=OBJECTIVES,
        seed=3,
        startup_trials=8,
    )


def measured(edits):
    time.sleep(0.02)
    strengths = [sum(k.peak_weight * k.reach for k in edit.kernels.values()) for edit in edits]
    return [{"refusals": Score(1 / (1 + s), "x")} for s in strengths]


def plan_of(model, number):
    """An edit of its own for each trial."""
    generator = torch.Generator().manual_seed(number)
    key: SiteKey = model.architecture.sites[number % len(model.architecture.sites)].key
    vector = torch.nn.functional.normalize(torch.randn(32, 1, generator=generator), dim=0)
    return {key: Operator(left=-vector, right=vector)}


def reporting(folder):
    """Where workers say what is finished: outside of a disk that fills up."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"soak-{os.getpid()}-{folder.name}"
    path.write_text("")
    (folder.parent / f"{folder.name}.said").symlink_to(path)
    return path


def worker(model_folder, place, folder, path, jump, seed):
    """A worker by a clock of its own; an error that a user would be shown ends it."""
    quiet_optuna()
    report = os.open(path, os.O_WRONLY | os.O_APPEND)
    now, chance = time.time, random.Random(seed)
    time.time = lambda: now() + jump
    store = PlanStore(folder, place[2])
    try:
        with open_storage(*place) as storage:
            for record in study(storage, place[2]).run(TRIALS, measured):
                if record.state != "complete":  # by a clock ahead of its own it was taken for dead
                    continue
                os.write(report, f"trial {record.number}\n".encode())
                model = loaded(model_folder)
                plan = plan_of(model, record.number)
                if chance.random() < 0.5:
                    digest = store.save(plan)
                    os.write(report, f"plan {digest} {record.number}\n".encode())
                if chance.random() < 0.2:
                    target = folder / f"model{record.number % 4}"
                    save_merged(model, plan, target, overwrite=True)
                    os.write(report, f"model {target.name}\n".encode())
    except (HereticKLError, SQLAlchemyError, OSError) as error:  # a full disk, a lost database
        os.write(report, f"error {type(error).__name__}\n".encode())
    finally:
        sys.stdout.flush()
        os._exit(0)


@contextmanager
def lost(database):
    """The database stopped for the block, as by a power cut."""
    database.stop()
    try:
        yield
    finally:
        database.start()


@contextmanager
def filled(folder):
    """The disk full for the block."""
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()
    try:
        yield
    finally:
        filler.unlink()


def said(folder, what):
    """What workers reported before they died: the words after `what`, line by line."""
    lines = (folder.parent / f"{folder.name}.said").read_text().splitlines()
    return [line.split()[1:] for line in lines if line.startswith(f"{what} ")]


def check_study(opened, folder):
    """The study has ended; nothing reported is lost, and nothing was measured twice."""
    complete = [record for record in opened.records if record.state == "complete"]
    assert len(complete) == TRIALS
    reported = {int(number) for (number,) in said(folder, "trial")}
    assert reported <= {record.number for record in complete}
    assert len({json.dumps(r.parameters, sort_keys=True) for r in complete}) == TRIALS
    assert all(record.scores["refusals"].value is not None for record in complete)


def check_artifacts(folder, name):
    """Every learned edit that was reported loads; whatever has a name is whole."""
    store = PlanStore(folder, name)
    reported = {digest for digest, _ in said(folder, "plan")}
    names = {path.name for path in store.folder.glob("[!.]*")}
    assert reported <= names
    for digest in names:
        assert len(store.load(digest)) == 1


def check_models(model, folder):
    """A folder under its final name is a whole model; what killed saves left goes with the next."""
    reported = {name for (name,) in said(folder, "model")}
    names = {path.name for path in folder.glob("model*")}
    assert reported <= names
    for name in names:
        saved = load_model(ModelSource(str(folder / name)), dtype="float32", device="cpu")
        assert saved.parameter_count == model.parameter_count
        save_merged(model, plan_of(model, 0), folder / name, overwrite=True)
    assert not [path.name for path in folder.glob(".model*")]
