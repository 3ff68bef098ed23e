"""Hours of kills, full disks, lost databases, jumping clocks; what was reported finished is there.

`make soak` runs it for `SOAK_MINUTES` (120), of some kinds alone by `SOAK_KINDS`, and writes what
was done to `SOAK_RECORD`. Each round is one study of three workers, on a journal file, on SQLite,
on a small disk that fills up, or on PostgreSQL or MariaDB, which are stopped and started at random
moments. What this machine cannot do is named at the beginning and at the end. Workers are killed
(kill -9) at random moments, their clocks jump by days, forwards and back, and all of them keep
learned edits, in a database too where there is one, and save models as they go. The seed of each
round is printed.
"""

import itertools
import json
import multiprocessing
import os
import random
import shutil
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

sys.path.append(str(Path(__file__).parents[2]))

from servers import mysql_server, postgresql_server  # noqa: E402

from benchmarks.soak import write  # noqa: E402

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
SERVERS = {"lost PostgreSQL": postgresql_server, "lost MariaDB": mysql_server}
PLACES = ("journal", "sqlite", "full disk", *SERVERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that all workers save edited."""
    return loaded(save_tiny_model(tmp_path_factory.mktemp("soak") / "model", tiny_llama()))


@cache
def loaded(folder):
    return load_model(ModelSource(str(folder)), dtype="float32", device="cpu")


@pytest.fixture
def databases():
    """The servers that are stopped and started, by kind of round, where they are installed."""
    with ExitStack() as stack:
        servers = {}
        for kind, server in SERVERS.items():
            with suppress(pytest.skip.Exception):
                servers[kind] = stack.enter_context(server())
        yield servers


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


def test_soak(model, tmp_path, small_disk, databases):
    quiet_optuna()
    start, load = time.monotonic(), os.getloadavg()[1]
    rounds, done = Counter(), Counter()
    why = {"full disk": "no disk can be mounted here", **{k: "not installed" for k in SERVERS}}
    unable = [kind for kind in why if not (databases | {"full disk": small_disk}).get(kind)]
    skipped = "; ".join(f"NOT TESTED: {kind} ({why[kind]})" for kind in unable)
    print(f"\n{skipped or 'every kind is tested'}", flush=True)
    only = os.environ.get("SOAK_KINDS", ",".join(PLACES)).split(",")
    kinds = [kind for kind in PLACES if kind not in unable and kind in only]
    assert kinds, f"SOAK_KINDS names none of {', '.join(PLACES)} that can be tested here"
    for kind, seed in zip(itertools.cycle(kinds), itertools.count()):
        if time.monotonic() > start + 60 * MINUTES:
            break
        folder = (small_disk if kind == "full disk" else tmp_path) / f"round{seed}"
        folder.mkdir()
        print(f"round {seed}: {kind}", flush=True)
        done += one_round(model, kind, folder, seed, databases.get(kind))
        rounds[kind] += 1
    assert rounds
    print(f"{dict(rounds)}; {dict(done)}; {skipped or 'nothing left out'}")
    if "SOAK_RECORD" in os.environ:
        minutes = round((time.monotonic() - start) / 60, 1)
        write(Path(os.environ["SOAK_RECORD"]), minutes, dict(rounds), dict(done), unable, load)
    if skipped:
        warnings.warn(skipped, UserWarning, stacklevel=1)


def one_round(model, kind, folder, seed, database):
    """One study to its end through kills, then every check; what was done to it, counted."""
    url = f"sqlite:///{folder / 'studies.db'}" if kind == "sqlite" else database and database.url
    name = f"s{seed}"
    place, chance = (url, folder, name), random.Random(seed)
    children, done = [], Counter()
    report = reporting(folder)
    for _ in range(KILLS):
        while len(children) < WORKERS:
            clock = [chance.choice([0.0, 0.0, 3 * DAY, -3 * DAY]) for _ in range(2)]
            clock.append(chance.expovariate(1 / PAUSE / WORKERS))
            life = (model.source.folder, place, folder, report, clock, chance.random())
            children.append(PROCESSES.Process(target=worker, args=life))
            children[-1].start()
        troubled = kind in ("full disk", *SERVERS) and chance.random() < 0.5
        done[kind] += troubled
        trouble = lost(database) if database else filled(folder)
        with trouble if troubled else ExitStack():
            time.sleep(chance.expovariate(1 / PAUSE))
        victim = children.pop(chance.randrange(len(children)))
        if victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
            done["kills"] += 1
        victim.join()
    for child in children:
        child.join(JOIN_SECONDS)
        assert child.exitcode is not None, "a worker does not end"
    with open_storage(*place) as storage:
        opened = study(storage, name)
        list(opened.run(TRIALS, measured))
        check_study(opened, folder)
        check_artifacts(folder, name, storage if url else None)
    check_models(model, folder)
    done["clocks that jumped"] += len(said(folder, "jump"))
    shutil.rmtree(folder)  # the small disk would fill up with rounds
    return done


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


def jumping(report, first, later, seconds):
    """A clock ahead by `first` seconds, from a moment on by `later` ones."""
    now, moment, said_so = time.time, time.monotonic() + seconds, []

    def clock():
        if time.monotonic() < moment:
            return now() + first
        if first != later and not said_so:
            said_so.append(os.write(report, f"jump {later - first:.0f}\n".encode()))
        return now() + later

    return clock


def worker(model_folder, place, folder, path, clock, seed):
    """A worker by a clock of its own; an error that a user would be shown ends it."""
    quiet_optuna()
    report = os.open(path, os.O_WRONLY | os.O_APPEND)
    chance = random.Random(seed)
    time.time = jumping(report, *clock)
    try:
        with open_storage(*place) as storage:
            store = PlanStore(folder, place[2], storage if place[0] else None)
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


def check_artifacts(folder, name, storage):
    """Every learned edit that was reported loads, from a database alone too; all are whole."""
    store = PlanStore(folder, name)
    reported = {digest for digest, _ in said(folder, "plan")}
    names = {path.name for path in store.folder.glob("[!.]*")}
    assert reported <= names
    for digest in names:
        assert len(store.load(digest)) == 1
    for digest in reported if storage else ():
        assert len(PlanStore(folder / "elsewhere", name, storage).load(digest)) == 1


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
