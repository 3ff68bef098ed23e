"""`heretic-kl save`: the model of a trial of a study, without searching again.

The study says what it was made with: model, prompts, scorers and every other setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.output import observing
from heretic_kl.cli.study.settings import SaveSettings, picked, read_named, rule_of
from heretic_kl.config import Settings, read_settings
from heretic_kl.errors import NoTrialError

if TYPE_CHECKING:
    from heretic_kl.search import StoredStudy, TrialRecord


def run(words: Sequence[str]) -> int:
    """Save the trial that the command line names; return the exit code."""
    named = read_settings(SaveSettings, words)
    rule = rule_of(named.trial, named.pick)
    study = read_named(named)
    try:
        record = picked(study, rule)
    except NoTrialError as error:
        if error.nearest is None:
            raise
        raise NoTrialError(
            f"{error}: save it with --trial {error.nearest}, or run more trials", error.nearest
        ) from None
    settings = _settings(words, named, study, record)

    from heretic_kl.cli.log import RunLog
    from heretic_kl.run import Session

    settle_process(settings)
    with ExitStack() as stack:
        observer = stack.enter_context(observing(quiet=settings.quiet))
        log = stack.enter_context(RunLog(settings, observer))
        session = stack.enter_context(Session(settings, log))
        record = session.pick(rule)
        assert settings.save is not None
        session.save(record, settings.save, settings.save_as, overwrite=settings.overwrite)
    return 0


def _settings(
    words: Sequence[str], named: SaveSettings, study: StoredStudy, record: TrialRecord
) -> Settings:
    """What the study was made with, and what the command line says on top."""
    again = read_settings(SaveSettings, words, stored=study.settings)
    values = again.model_dump(exclude={"study", "trial"})
    folder = again.save or Path(f"{Path(str(again.model)).stem}-edited-trial-{record.number}")
    values.update(
        study_name=study.name,
        study_dir=study.folder or named.study_dir,
        storage=named.storage,
        save=folder,
        pick=None,
    )
    return Settings(**values)


COMMAND = Command(
    "save [STUDY] --trial NUMBER [--save FOLDER] [--SETTING VALUE ...]",
    f"{SUMMARIES['save']}, read it back and measure it. Nothing is searched: the study says what "
    "it was made with, and a setting on the command line replaces what it says.",
    run,
    SaveSettings,
    first_words=("--study",),
)
