"""`heretic-kl save`: the model of a trial of a study, without searching again.

The study says what it was made with: model, prompts, scorers and every other setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.edits.upload import put_saved
from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.output import observing
from heretic_kl.cli.study.rerun_trial import measured_with_other_code, session_beside
from heretic_kl.cli.study.settings import (
    SaveSettings,
    lacking,
    picked,
    read_named,
    rule_of,
    settings_of,
)
from heretic_kl.config import read_settings
from heretic_kl.errors import ConfigError, NoTrialError


def run(words: Sequence[str]) -> int:
    """Save the trial that the command line names; return the exit code."""
    named = read_settings(SaveSettings, words)
    if named.public and named.upload is None:
        raise ConfigError("--public is about an upload: say where to with --upload NAME")
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
    settings = settings_of(SaveSettings, words, named, study)
    folder = settings.save or Path(f"{Path(str(settings.model)).stem}-edited-trial-{record.number}")
    settings = settings.model_copy(update={"save": folder})
    from heretic_kl.cli.log import RunLog
    from heretic_kl.events import Notice
    from heretic_kl.export import Target, check_upload
    from heretic_kl.run import Session
    from heretic_kl.run.saving.rebuild import save_from_elsewhere

    settle_process(settings)
    form, overwrite = settings.save_as, settings.overwrite
    with ExitStack() as stack:
        observer = stack.enter_context(observing(quiet=settings.quiet))
        target = None
        if named.upload is not None:  # what the hub would refuse is found out before the work
            target = check_upload(Target(named.upload, public=named.public))
        if not measured_with_other_code(study, settings):
            log = stack.enter_context(RunLog(settings, observer))
            keeps = settings.model_copy(update=lacking(study))
            session = stack.enter_context(Session(settings, log, keeps=keeps))
            session.save(session.pick(rule), folder, form, overwrite=overwrite)
            if target is not None:
                put_saved(folder, target, log, quiet=settings.quiet)
            return 0
        observer(
            Notice(
                f"study {study.name} was measured by other code than this, or by other scorers: "
                "the trial is measured anew, and the study stays as it is"
            )
        )
        session = stack.enter_context(
            session_beside(study, record, settings, observer, measures=True)
        )
        save_from_elsewhere(
            session.parts,
            record,
            folder,
            form,
            overwrite=overwrite,
            pick_rule=rule,
            trials=len(study.records),
        )
        if target is not None:
            put_saved(folder, target, observer, quiet=settings.quiet)
    return 0


COMMAND = Command(
    "save [STUDY] --trial NUMBER [--save FOLDER] [--upload NAME] [--SETTING VALUE ...]",
    f"{SUMMARIES['save']}, read it back and measure it. Nothing is searched: the study says what "
    "it was made with, and a setting on the command line replaces what it says.",
    run,
    SaveSettings,
    first_words=("--study",),
)
