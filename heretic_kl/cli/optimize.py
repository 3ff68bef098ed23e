"""`heretic-kl optimize`, the default command: search, pick a trial, save the model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from heretic_kl.cli.command import PROGRAM, Command, at_terminal
from heretic_kl.config import Settings, load_settings
from heretic_kl.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from heretic_kl.events import Observer
    from heretic_kl.run import Session
    from heretic_kl.search import TrialRecord
    from heretic_kl.ui.console import ConsoleObserver

TRIALS_KEPT = "finished trials are kept"


def run(words: Sequence[str]) -> int:
    """Search as the command line says; return the exit code."""
    settings = load_settings(words)
    if settings.model is None:
        raise ConfigError(
            "no model given: name one with --model (a hub id, a local folder or a .gguf file), "
            f"or try `{PROGRAM} demo`"
        )
    return search(settings)


def search(settings: Settings, *, demo: bool = False) -> int:
    """Search, pick and save; with `demo`, on the demo model.

    Raises:
        ConfigError: `save` is set, nobody can be asked, and no rule picks a trial.
    """
    interactive = settings.pick is None and at_terminal()
    if settings.save is not None and settings.pick is None and not interactive:
        raise ConfigError("--save without a terminal needs --pick, for instance --pick knee")
    from heretic_kl.cli.log import RunLog
    from heretic_kl.run import Session
    from heretic_kl.ui.console import ConsoleObserver
    from heretic_kl.ui.terminal import make_console

    _settle_process(settings)
    results = make_console()
    with ExitStack() as stack:
        console = stack.enter_context(ConsoleObserver(quiet=settings.quiet, results=results))
        log = stack.enter_context(RunLog(settings, console))
        if demo:
            settings = settings.model_copy(update={"model": _demo_model(log)})
        session = stack.enter_context(Session(settings, log))
        session.search()
        session.refine()
        session.test()
        if interactive:
            return _ask(settings, session, console, results)
        console.settle()
        _pick_and_save(settings, session, results)
    return 0


def _settle_process(settings: Settings) -> None:
    """What holds for the whole process, which a program may decide and a library may not."""
    import torch

    from heretic_kl.search import quiet_optuna

    quiet_optuna()
    if settings.threads:
        torch.set_num_threads(settings.threads)


def _pick_and_save(settings: Settings, session: Session, results: Console) -> None:
    from heretic_kl.report import front_rows
    from heretic_kl.search import UNEDITED
    from heretic_kl.ui.console import print_front

    rows = front_rows(
        session.front,
        session.tested,
        baseline=session.baseline,
        test_baseline=session.test_scores(UNEDITED),
    )
    print_front(results, rows)
    if settings.pick is not None:
        record = session.pick(settings.pick)
        session.test_one(record.number)
        if settings.save is not None:
            form, overwrite = settings.save_as, settings.overwrite
            session.save(record, settings.save, form, overwrite=overwrite)


def _ask(settings: Settings, session: Session, observer: ConsoleObserver, results: Console) -> int:
    """Let a person choose what becomes of the front."""
    from heretic_kl.ui.picker import Picker

    name = Path(str(settings.model)).stem

    def default_folder(record: TrialRecord) -> Path:
        return settings.save or Path(f"{name}-edited-trial-{record.number}")

    picker = Picker(
        session,
        results,
        default_folder=default_folder,
        settle=observer.settle,
        response_tokens=max(settings.max_response_tokens, 200),
    )
    return picker.run()


def _demo_model(observer: Observer) -> str:
    from heretic_kl.demo import ensure_demo_model
    from heretic_kl.events import Notice

    return str(ensure_demo_model(notify=lambda message: observer(Notice(message))))


COMMAND = Command(
    "--model MODEL [--SETTING VALUE ...]",
    "Finds the edit of a language model that removes a behaviour (by default: refusing) and "
    "changes everything else least, measured by teacher-forced KL divergence.",
    run,
    Settings,
    kept=TRIALS_KEPT,
)
