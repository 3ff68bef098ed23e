"""`heretic-kl show`: all that is known of one trial, without its model. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.output import observing
from heretic_kl.cli.study.settings import ShowSettings, picked, read_named, rule_of
from heretic_kl.cli.study.trials import shown
from heretic_kl.config import read_settings


def run(words: Sequence[str]) -> int:
    """Show the trial that the command line names; return the exit code."""
    settings = read_settings(ShowSettings, words)
    rule = rule_of(settings.trial, settings.pick)
    study = read_named(settings)
    record = picked(study, rule)
    with observing() as observer:
        observer(shown(study, record))
    return 0


COMMAND = Command(
    "show [STUDY] --trial NUMBER [--FLAG VALUE ...]",
    f"{SUMMARIES['show']}: its edit, its scores with their errors, and the profile of the KL. "
    "No model is loaded.",
    run,
    ShowSettings,
    first_words=("--study",),
)
