"""`heretic-kl show`: all that is known of one trial, or what it responds. Changes nothing.

Its model is loaded for responses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

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
from heretic_kl.errors import ConfigError

if TYPE_CHECKING:
    from heretic_kl.scoring import PreviewedResponse
    from heretic_kl.search import StoredStudy, TrialRecord


def run(words: Sequence[str]) -> int:
    """Show the trial that the command line names, or compare it; return the exit code.

    Raises:
        HereticKLError: a wrong flag, study or trial; or the trial cannot be run again.
    """
    runs = any(word.partition("=")[0] == "--preview" for word in words)
    settings: PreviewSettings | ShowSettings | None = None
    if runs:
        settings = read_settings(PreviewSettings, words)
    if settings is None or not settings.preview:  # flags of a run are no flags then
        settings = read_settings(ShowSettings, words)
    rule = rule_of(settings.trial, settings.pick)
    if settings.preview and settings.compare is not None:
        raise ConfigError("--preview shows responses, --compare differences: leave one out")
    study = read_named(settings)
    record = picked(study, rule)
    if isinstance(settings, PreviewSettings) and settings.preview:
        of_run = settings_of(PreviewSettings, words, settings, study, measures=False)
        _preview(study, record, of_run)
        return 0
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


def _preview(study: StoredStudy, record: TrialRecord, settings: Settings) -> None:
    """Respond to harmless prompts without the edit and with it, as the study was made."""
    from heretic_kl.events import Result
    from heretic_kl.ui.preview import SHOWN_RESPONSES, print_responses
    from heretic_kl.ui.terminal import make_console

    settings = settings.model_copy(update={"save": None})
    settle_process(settings)
    with (
        observing(quiet=settings.quiet) as observer,
        session_beside(study, record, settings, observer, measures=False) as session,
    ):
        original = session.responses(None, "harmless", SHOWN_RESPONSES)
        edited = session.responses(record, "harmless", SHOWN_RESPONSES)
        pairs = [
            {"prompt": before.prompt, "original": _said(before), "edited": _said(after)}
            for before, after in zip(original, edited, strict=True)
        ]
        content = {"study": study.name, "trial": record.number, "responses": pairs}
        observer(Result("show", content))
    if not writes_json():
        print_responses(make_console(), original, edited, record.number)


def _said(response: PreviewedResponse) -> dict[str, str | None]:
    return {"text": response.text, "degenerate": response.degeneracy}


COMMAND = Command(
    "show [STUDY] --trial NUMBER [--compare NUMBER] [--preview] [--FLAG VALUE ...]",
    f"{SUMMARIES['show']}: its edit, its scores with their errors, and the profile of the KL; "
    "with --compare, its differences from another trial. With --preview the model is loaded: the "
    "original and the trial respond to a few harmless validation prompts, and any setting of a run "
    "(--device cpu) replaces what the study says.",
    run,
    ShowSettings,
    first_words=("--study",),
)
