"""`heretic-kl show`: all that is known of one trial, without its model. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.cli.study.settings import ShowSettings, picked, read_named, rule_of
from heretic_kl.cli.study.trials import shown
from heretic_kl.config import read_settings

if TYPE_CHECKING:
    from heretic_kl.search import StoredStudy, TrialRecord


def run(words: Sequence[str]) -> int:
    """Show the trial that the command line names, or compare it; return the exit code."""
    settings = read_settings(ShowSettings, words)
    rule = rule_of(settings.trial, settings.pick)
    study = read_named(settings)
    record = picked(study, rule)
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


COMMAND = Command(
    "show [STUDY] --trial NUMBER [--compare NUMBER] [--FLAG VALUE ...]",
    f"{SUMMARIES['show']}: its edit, its scores with their errors, and the profile of the KL; "
    "with --compare, its differences from another trial. No model is loaded.",
    run,
    ShowSettings,
    first_words=("--study",),
)
