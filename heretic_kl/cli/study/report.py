"""`heretic-kl report`: one HTML page from a study, finished or running. Loads no model."""

from __future__ import annotations

import sys
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.output import STDOUT, observing, write, writes_json
from heretic_kl.cli.study.settings import StudySettings, read_named
from heretic_kl.config import read_settings
from heretic_kl.config.tables import Location, Text, setting
from heretic_kl.errors import ConfigError, ExportError, StudyError


class ReportSettings(StudySettings):
    """Which study, and where the report goes."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Report": ("output", "open", "png", "card", "pick", "harmful_responses"),
        "Study": ("study", "study_dir", "storage"),
        "Output": ("quiet", "debug"),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Report", "Study", "Output")

    output: Location | None = setting(
        None,
        "File of the report, - for stdout (default: STUDY.html beside the study)",
        metavar="FILE",
        short="o",
    )
    open: bool = setting(False, "Open the report in the browser, if stdout is a terminal")
    png: Location | None = setting(
        None, "Write the main charts as PNG into this folder", metavar="FOLDER"
    )
    card: Location | None = setting(
        None, "Show the main charts in the card of this saved model", metavar="FOLDER"
    )
    pick: Text | None = setting(
        None, "Trial that it is about (default: saved last): knee, trial=17", metavar="RULE"
    )
    harmful_responses: bool = setting(
        False, "Show responses to harmful prompts that --keep-responses all kept"
    )


def run(words: Sequence[str]) -> int:
    """Write the report; return the exit code.

    Raises:
        HereticKLError: there is no such study, or a file cannot be written; one line each.
    """
    settings = _with_folder(read_settings(ReportSettings, words))
    if settings.output == STDOUT and (writes_json() or settings.open):
        flag = "--json" if writes_json() else "--open"
        raise ConfigError(f"--output -: stdout holds the page; leave out {flag} or name a file")
    study = read_named(settings)

    from heretic_kl.events import Notice, Result
    from heretic_kl.export import CardPicture, add_figures, portable
    from heretic_kl.report import StudyReport, pictures, png, render
    from heretic_kl.search import PlanStore, RunFile, importances
    from heretic_kl.search.records import one_line
    from heretic_kl.search.storage.backends import NOT_AS_WRITTEN
    from heretic_kl.ui.terminal import make_console, say

    beside = study.folder or settings.study_dir
    run_file = RunFile(beside, study.name)
    report = StudyReport(
        study,
        run=run_file.read(),
        plans=PlanStore(beside, study.name),
        importances=importances(study.trials, len(study.roles)),
        settings=portable(dict(study.settings)),
        rule=settings.pick,
        harmful=settings.harmful_responses,
    )
    try:
        page = report.page()
    except NOT_AS_WRITTEN as error:
        what = f"{str(run_file.path)!r} or its study holds what no run writes: move it away"
        raise StudyError(f"{what} ({one_line(error)[:200]})") from error
    target = settings.output or beside / f"{study.name}.html"
    contents = {target: render(page).encode("utf-8", "backslashreplace")}
    if target == STDOUT:
        write(contents.pop(target).decode("utf-8"))
    shown = pictures(page) if settings.png or settings.card else ()
    drawn = [CardPicture(f.name, png(f.drawing), f.summary, f.caption) for f in shown]
    if settings.png is not None:
        contents |= {settings.png / f"{picture.name}.png": picture.png for picture in drawn}
    for path, content in contents.items():
        _write(path, content)
    files = [*contents]
    if settings.card is not None:
        files += add_figures(settings.card, drawn)
    with observing(quiet=settings.quiet) as observer:
        observer(Result("report", {"study": study.name, "files": [str(path) for path in files]}))
        if settings.open and (problem := _not_opened(target)):
            observer(Notice(problem))
    if not writes_json() and target != STDOUT:
        for path in files:
            say(make_console(), str(path))
    return 0


def _with_folder(settings: ReportSettings) -> ReportSettings:
    """The settings, STUDY a name or a journal file: a folder in its place is that of studies."""
    if settings.study is not None and Path(settings.study).is_dir():
        changes = {"study": None, "study_dir": Path(settings.study)}
        return settings.model_copy(update=changes)
    return settings


def _not_opened(page: Path) -> str | None:
    """Open a page in the browser; where that cannot be, why, in a line."""
    if writes_json() or not sys.stdout.isatty():
        why = "stdout is no terminal"
    else:
        try:
            if webbrowser.open(page.resolve().as_uri()):
                return None
        except (OSError, webbrowser.Error):
            pass  # as where there is none
        why = "no browser was found"
    return f"--open: {why}; open {str(page)!r} yourself"


def _write(path: Path, content: bytes) -> None:
    from heretic_kl.files import new_file

    try:
        with new_file(path) as partial:
            partial.write_bytes(content)
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {error.strerror}") from error


COMMAND = Command(
    "report [STUDY] [-o FILE] [--open] [--card MODEL] [--FLAG VALUE ...]",
    f"{SUMMARIES['report']}, finished or still running: the Pareto front, the search, KL at each "
    "position, the edit, the directions, responses side by side, every trial and setting. No model "
    "is loaded.",
    run,
    ReportSettings,
    first_words=("--study",),
)
