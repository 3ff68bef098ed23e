"""`heretic-kl show`: all that is known of one trial, what it responds, how it does on test prompts.

Its model is loaded for the last two alone. Only scores on the test prompts are new in the study.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.cli.study.rerun_trial import session_beside
from heretic_kl.cli.study.settings import (
    PreviewSettings,
    ShowSettings,
    picked,
    read_named,
    rule_of,
    settings_of,
)
from heretic_kl.cli.study.trials import shown
from heretic_kl.config import Settings, read_settings
from heretic_kl.errors import ConfigError, SelectionError

if TYPE_CHECKING:
    from heretic_kl.scoring import PreviewedResponse
    from heretic_kl.search import StoredStudy, TrialRecord


def run(words: Sequence[str]) -> int:
    """Show the trial that the command line names, or compare it; return the exit code.

    Raises:
        HereticKLError: a wrong flag, study or trial; or the trial cannot be run again.
    """
    runs = any(word.partition("=")[0] in ("--preview", "--test") for word in words)
    settings: PreviewSettings | ShowSettings | None = None
    if runs:
        settings = read_settings(PreviewSettings, words)
    runs = settings is not None and (settings.preview is not None or settings.test)
    if settings is None or not runs:  # flags of a run are no flags then
        settings = read_settings(ShowSettings, words)
    rule = rule_of(settings.trial, settings.pick)
    if settings.preview and settings.compare is not None:
        raise ConfigError("--preview shows responses, --compare differences: leave one out")
    if settings.test and (settings.preview or settings.compare is not None):
        raise ConfigError("--test measures a trial: leave out --preview and --compare")
    tokens = settings.test_kl_tokens if isinstance(settings, PreviewSettings) else None
    study = read_named(settings, tokens)
    record = picked(study, rule)
    if isinstance(settings, PreviewSettings) and settings.preview:
        of_run = settings_of(PreviewSettings, words, settings, study, measures=False)
        _preview(study, record, of_run, settings.preview)
        return 0
    if isinstance(settings, PreviewSettings) and record.number not in study.tested:
        _test(record, settings_of(PreviewSettings, words, settings, study))
        study = read_named(settings, tokens)
    if settings.compare is not None:
        _compare(study, record, picked(study, f"trial={settings.compare}"))
        return 0
    with observing() as observer:
        observer(shown(study, record))
    return 0


def _compare(study: StoredStudy, record: TrialRecord, other: TrialRecord) -> None:
    from heretic_kl.events import Result
    from heretic_kl.report import compare_trials
    from heretic_kl.ui.print_tables import print_comparison
    from heretic_kl.ui.terminal import make_console

    comparison = compare_trials(record, other, study.tested)
    with observing() as observer:
        observer(Result("show", comparison.to_dict()))
    if not writes_json():
        print_comparison(make_console(), comparison)


def _test(record: TrialRecord, settings: Settings) -> None:
    """Measure a trial on the test prompts; its study holds the scores then.

    Raises:
        SelectionError: the trial has no edit.
        StudyError: the study was made with another model, other settings or other scorers.
    """
    from heretic_kl.cli.log import RunLog
    from heretic_kl.run import Session

    if record.edit is None:
        raise SelectionError(f"trial {record.number} was interrupted and has no edit")
    settle_process(settings)
    with observing(quiet=settings.quiet) as observer, RunLog(settings, observer) as log:
        with Session(settings, log, joins=True) as session:
            session.test_one(record.number)


def _preview(
    study: StoredStudy,
    record: TrialRecord,
    settings: Settings,
    kind: Literal["harmless", "harmful"],
) -> None:
    """Respond to prompts without the edit and with it, as the study was made.

    Of responses to harmful prompts only the verdicts are shown.
    """
    from heretic_kl.events import Result
    from heretic_kl.ui import preview
    from heretic_kl.ui.terminal import make_console

    settings = settings.model_copy(update={"save": None})
    settle_process(settings)
    with (
        observing(quiet=settings.quiet) as observer,
        session_beside(study, record, settings, observer, measures=False) as session,
    ):
        harmless = kind == "harmless"
        count = preview.SHOWN_RESPONSES if harmless else preview.SHOWN_VERDICTS
        original = session.responses(None, kind, count)
        edited = session.responses(record, kind, count)
        shown_of = _said if harmless else preview.verdict
        pairs = [
            {"prompt": before.prompt, "original": shown_of(before), "edited": shown_of(after)}
            for before, after in zip(original, edited, strict=True)
        ]
        key = "responses" if harmless else "verdicts"
        observer(Result("show", {"study": study.name, "trial": record.number, key: pairs}))
    if writes_json():
        return
    if harmless:
        preview.print_responses(make_console(), original, edited, record.number)
    else:
        preview.print_verdicts(make_console(), original, edited)


def _said(response: PreviewedResponse) -> dict[str, str | None]:
    return {"text": response.text, "degenerate": response.degeneracy}


COMMAND = Command(
    "show [STUDY] --trial NUMBER [--compare N | --preview | --test] [--FLAG VALUE ...]",
    f"{SUMMARIES['show']}: its edit, its scores with their errors, and the profile of the KL; "
    "with --compare, its differences from another trial. With --preview or --test the model is "
    "loaded, and any setting of a run (--device cpu) replaces what the study says. With --preview "
    "the original and the trial respond to a few validation prompts: harmless ones show the "
    "responses, harmful ones only who refuses. --test measures the trial on the test prompts.",
    run,
    ShowSettings,
    first_words=("--study",),
)
