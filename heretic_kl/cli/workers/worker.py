"""`heretic-kl worker`: joins a study that another process began, from this or another machine.

The study says what it was made with. What it says is checked like a stranger's: a worker runs no
plug-in and no model's code that its own command line does not name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar, Final

from heretic_kl.cli.command import PROGRAM, SUMMARIES, Command
from heretic_kl.cli.optimize import (
    TRIALS_KEPT,
    check_workers,
    first_share,
    search_together,
    settle_process,
)
from heretic_kl.cli.output import observing
from heretic_kl.cli.study.settings import read_beside_study, read_named
from heretic_kl.config import Settings, read_settings
from heretic_kl.config.tables import Number, Text, setting
from heretic_kl.errors import ConfigError, StudyError

if TYPE_CHECKING:
    from heretic_kl.events import Observer
    from heretic_kl.search import StoredStudy

POLL_SECONDS: Final = 1.0


class WorkerSettings(Settings):
    """Which study; whatever else is set replaces what the study was made with."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Study": ("study", "wait_minutes"),
        **Settings.headings,
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Study", "Performance")

    study: Text | None = setting(None, "Name or .journal file of the study", metavar="STUDY")
    wait_minutes: Number = setting(10.0, "How long to wait for a study that is not there yet", ge=0)


def run(words: Sequence[str]) -> int:
    """Run trials of the study that the command line names; return the exit code.

    With `--workers` there are more processes, on this machine, with the same command line.
    """
    named = read_settings(WorkerSettings, words)
    if named.study is None:
        raise ConfigError(f"say which study: {PROGRAM} worker --study NAME")
    from heretic_kl.cli.log import RunLog
    from heretic_kl.run import Session

    with ExitStack() as stack:
        observer = stack.enter_context(observing(quiet=named.quiet))
        settings = _settings(words, named, _study(named, observer))
        check_workers(settings)
        whole, first = first_share(settings)
        settle_process(first)
        log = stack.enter_context(RunLog(first, observer))
        session = stack.enter_context(Session(first, log, joins=True))
        search_together(whole, session, log, words)
        session.refine()
    return 0


def _study(named: WorkerSettings, observer: Observer) -> StoredStudy:
    """The study, as soon as there is one."""
    from heretic_kl.events import Notice
    from heretic_kl.search import check_storage

    check_storage(named.storage, named.study_dir, None)
    deadline, said = time.monotonic() + 60 * named.wait_minutes, False
    while True:
        try:
            return read_named(named, or_demo=False)
        except StudyError as error:
            if time.monotonic() > deadline:
                raise
            if not said:
                observer(Notice(f"{error}: waiting for it (Ctrl+C to stop)"))
            said = True
        time.sleep(POLL_SECONDS)


def _settings(words: Sequence[str], named: WorkerSettings, study: StoredStudy) -> Settings:
    """What the study was made with, and what the command line says on top."""
    again = read_beside_study(WorkerSettings, words, study)
    values = again.model_dump(exclude={"study", "wait_minutes"})
    values.update(
        study_name=study.name,
        study_dir=study.folder or named.study_dir,
        storage=named.storage,
        pick=None,
        save=None,
    )
    return Settings(**values)


COMMAND = Command(
    "worker [STUDY] [--storage URL] [--workers N] [--SETTING VALUE ...]",
    f"{SUMMARIES['worker']}. The study says what it was made with; name --model where it lies "
    "elsewhere on this machine. TERM and Ctrl+C hand the running trial back.",
    run,
    WorkerSettings,
    kept=TRIALS_KEPT,
    first_words=("--study",),
)
