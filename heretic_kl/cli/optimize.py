"""`heretic-kl optimize`, the default command: search, pick a trial, save the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from heretic_kl.cli.command import PROGRAM, Command, at_terminal
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.config import Settings, load_settings
from heretic_kl.errors import ConfigError
from heretic_kl.ranks import launched

if TYPE_CHECKING:
    from heretic_kl.events import FrontShown, Observer
    from heretic_kl.run import Session
    from heretic_kl.search import TrialRecord

REFUSALS = "refusals"
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
    check_workers(settings)
    interactive = settings.pick is None and at_terminal() and not writes_json()
    if settings.save is not None and settings.pick is None and not interactive:
        settings = settings.model_copy(update={"pick": _default_rule(settings)})
    from heretic_kl.cli.log import RunLog
    from heretic_kl.run import Session

    with ExitStack() as stack:
        observer = stack.enter_context(observing(quiet=settings.quiet))
        log = stack.enter_context(RunLog(settings, observer))
        if demo:
            settings = settings.model_copy(update={"model": _demo_model(log)})
        whole, first = first_share(settings)
        settle_process(first)
        session = stack.enter_context(Session(first, log, keeps=settings))
        search_together(whole, session, log)
        session.refine()
        session.test()
        if interactive:
            session.tell_judging()
            return _ask(settings, session, log, observer.settle)
        observer(front_of(session))
        _pick_and_save(settings, session)
    return 0


def check_workers(settings: Settings) -> None:
    """Raise ConfigError where `--workers` starts processes and `torchrun` does so too."""
    if settings.workers != 1 and launched() > 1:
        raise ConfigError("torchrun starts the processes of one worker: leave --workers out")


def first_share(settings: Settings) -> tuple[Settings, Settings]:
    """Settings of all workers together, and of this process, which is the first of them."""
    if settings.workers == 1:
        return settings, settings
    import torch

    from heretic_kl.cli.workers.local import shares

    threads = settings.threads or torch.get_num_threads()
    whole = settings.model_copy(update={"threads": threads})
    return whole, whole.model_copy(update=shares(whole)[0]._asdict())


def search_together(
    settings: Settings, session: Session, observer: Observer, flags: Sequence[str] = ()
) -> None:
    """Run trials, with the other workers; afterwards this process has all threads.

    Args:
        settings: of all workers together.
        session: of this process, with its share.
        observer: told of workers that ended with an error.
        flags: by which the other workers differ from what the study says.
    """
    if settings.workers == 1:
        session.search()
        return
    import torch

    from heretic_kl.cli.workers.local import helpers

    with helpers(settings, session, observer, flags):
        session.search()
    torch.set_num_threads(settings.threads)


def settle_process(settings: Settings) -> None:
    """What holds for the whole process, which a program may decide and a library may not."""
    import torch

    from heretic_kl.search import quiet_optuna

    quiet_optuna()
    if settings.threads:
        torch.set_num_threads(settings.threads)


def front_of(session: Session) -> FrontShown:
    """The front of a session's study, with all that is measured of it."""
    from heretic_kl.events import FrontShown
    from heretic_kl.search import UNEDITED, alike_behind

    front = session.front
    return FrontShown(
        session.parts.study.name,
        front,
        session.tested,
        session.baseline,
        session.test_scores(UNEDITED),
        alike_behind(front, session.trials),
    )


def _default_rule(settings: Settings) -> str:
    """The least damaging trial that is likely to meet the target."""
    refusals = settings.scorers.get(REFUSALS)
    if refusals is None or not refusals.enabled or refusals.role != "minimize":
        raise ConfigError("--save without a terminal needs --pick, for instance --pick knee")
    return f"likely-{REFUSALS}={settings.target_refusals:g}"


def _pick_and_save(settings: Settings, session: Session) -> None:
    if settings.pick is not None:
        record = session.pick(settings.pick)
        session.test_one(record.number)
        if settings.save is not None:
            form, overwrite = settings.save_as, settings.overwrite
            session.save(record, settings.save, form, overwrite=overwrite)


def _ask(
    settings: Settings, session: Session, observer: Observer, settle: Callable[[], None]
) -> int:
    """Let a person choose what becomes of the front."""
    from heretic_kl.cli.edits.upload import put
    from heretic_kl.export import Target
    from heretic_kl.files import free_folder
    from heretic_kl.ui.picker import Picker
    from heretic_kl.ui.terminal import make_console

    name = Path(str(settings.model)).stem

    def default_folder(record: TrialRecord) -> Path:
        folder = settings.save or Path(f"{name}-edited-trial-{record.number}")
        return folder if settings.overwrite else free_folder(folder)

    def upload(folder: Path, repo: str, overwrite: bool) -> None:
        put(folder, Target(repo, overwrite=overwrite), observer, quiet=settings.quiet)

    picker = Picker(
        session,
        make_console(),
        default_folder=default_folder,
        upload=upload,
        settle=settle,
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
