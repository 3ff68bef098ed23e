"""`heretic-kl trials`: what a study holds, without its model. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.cli.study.settings import TrialsSettings, read_named
from heretic_kl.config import read_settings

if TYPE_CHECKING:
    from heretic_kl.events import TrialShown
    from heretic_kl.search import StoredStudy, TrialRecord


def run(words: Sequence[str]) -> int:
    """List the trials of the study that the command line names; return the exit code."""
    settings = read_settings(TrialsSettings, words)
    study = read_named(settings)

    listed = _listed(study, settings)

    from heretic_kl.events import FrontShown

    with observing() as observer:
        if writes_json():
            for record in listed:
                observer(shown(study, record))
        else:
            chosen = settings.every or settings.where is not None or settings.sort is not None
            _print_summary(study, listed if chosen else ())
        observer(
            FrontShown(study.name, study.front, study.tested, study.baseline, study.test_baseline)
        )
    return 0


def shown(study: StoredStudy, record: TrialRecord) -> TrialShown:
    """One trial of a study, with all that is measured of it."""
    from heretic_kl.events import TrialShown

    numbers = {member.number for member in study.front}
    tested = study.tested.get(record.number)
    return TrialShown(study.name, record, record.number in numbers, tested)


def _listed(study: StoredStudy, settings: TrialsSettings) -> Sequence[TrialRecord]:
    """All trials, or those that are finished as the settings choose and sort them."""
    from heretic_kl.search import by_score, meeting

    records = study.records
    if settings.where is not None or settings.sort is not None:
        records = tuple(record for record in records if record.state == "complete")
    if settings.where is not None:
        records = meeting(settings.where, records)
    return records if settings.sort is None else by_score(settings.sort, records, study.roles)


def _print_summary(study: StoredStudy, listed: Sequence[TrialRecord]) -> None:
    from heretic_kl.report import align, scores_line, stopped_line
    from heretic_kl.ui.terminal import make_console, say

    console = make_console()
    states = Counter(record.state for record in study.records)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    say(console, f"study {study.name}: {counts or 'no trials'}", "bold")
    lines = []
    for record in listed:
        text = record.error or scores_line(record.scores)
        if record.stopped is not None:
            text = stopped_line(record.stopped)
        lines.append([f"{record.number:>4}", record.state, text])
    for line in align(lines):
        say(console, line)


COMMAND = Command(
    "trials [STUDY] [--all] [--where LIMITS] [--sort SCORE] [--FLAG VALUE ...]",
    f"{SUMMARIES['trials']}: its Pareto front, with scores on the validation prompts and, where "
    "they were measured, on the test prompts. No model is loaded, and a search may be running.",
    run,
    TrialsSettings,
    first_words=("--study",),
)
