"""`heretic-kl trials`: what a study holds, without its model. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.cli.study.settings import TrialsSettings, picked, read_named
from heretic_kl.config import read_settings
from heretic_kl.errors import ConfigError, NoTrialError, SelectionError, StudyError

if TYPE_CHECKING:
    from heretic_kl.events import TrialShown
    from heretic_kl.search import StoredStudy, TrialRecord


def run(words: Sequence[str]) -> int:
    """List the trials of the study that the command line names; return the exit code."""
    settings = read_settings(TrialsSettings, words)
    if settings.beside:
        return _table(settings)
    study = read_named(settings)

    listed = _listed(study, settings)

    from heretic_kl.events import FrontShown
    from heretic_kl.search import alike_behind

    front = study.front
    with observing() as observer:
        if writes_json():
            for record in listed:
                observer(shown(study, record))
        else:
            chosen = settings.every or settings.where is not None or settings.sort is not None
            _print_summary(study, listed if chosen else ())
        observer(
            FrontShown(
                study.name,
                front,
                study.tested,
                study.baseline,
                study.test_baseline,
                alike_behind(front, study.records),
            )
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


def _table(settings: TrialsSettings) -> int:
    """Show several studies beside each other; 1 where one of them cannot be read or picked from.

    Raises:
        SelectionError: the rule can be applied to none of them.
    """
    from heretic_kl.events import Result
    from heretic_kl.report import studies_footnotes, studies_section, study_rows
    from heretic_kl.ui.print_tables import print_sections
    from heretic_kl.ui.terminal import make_console, say

    if settings.study is None:
        raise ConfigError("--beside names more studies: name the first one too")
    studies: dict[str, StoredStudy | str] = {}
    chosen: dict[str, TrialRecord | None] = {}
    problem: StudyError | SelectionError | None = None
    for name in dict.fromkeys((settings.study, *settings.beside)):
        try:
            studies[name] = study = read_named(settings.model_copy(update={"study": name}))
            chosen[name] = picked(study, settings.pick)
        except NoTrialError:
            chosen[name] = None
        except (StudyError, SelectionError) as error:
            studies[name], problem = str(error), error
    if isinstance(problem, SelectionError) and not chosen:
        raise problem
    rows = study_rows(studies, chosen)
    with observing() as observer:
        observer(Result("trials", {"pick": settings.pick, "rows": [r.to_dict() for r in rows]}))
    if not writes_json():
        console = make_console()
        print_sections(console, [studies_section(rows, settings.pick)])
        for note in studies_footnotes(rows):
            say(console, note, "dim")
    return int(any(isinstance(study, str) for study in studies.values()))


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
    "trials [STUDY] [--all] [--beside STUDY ...] [--FLAG VALUE ...]",
    f"{SUMMARIES['trials']}: its Pareto front, with scores on the validation prompts and, where "
    "they were measured, on the test prompts. No model is loaded, and a search may be running.",
    run,
    TrialsSettings,
    first_words=("--study",),
)
