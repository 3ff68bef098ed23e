"""Events of a run as lines for people. Starts nothing, asks nothing, decides nothing.

Progress and notices go to stderr, results (the pick, what was saved, the front) to stdout: a
pipe gets what was found out, the person at the terminal sees how it goes. `quiet` leaves
notices and results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Console

from heretic_kl.events import (
    BaselineMeasured,
    CalibrationStep,
    Ended,
    Event,
    Failed,
    FrontShown,
    ModelLoaded,
    ModelSaved,
    ModelUploaded,
    Notice,
    ResponsesJudged,
    Result,
    StageAdvanced,
    StageFinished,
    StageStarted,
    StudyOpened,
    TrialFinished,
    TrialPicked,
    TrialShown,
    TrialTested,
)
from heretic_kl.report import (
    FrontRow,
    align,
    compact,
    describe_edit,
    duration,
    front_footnotes,
    front_lines,
    front_rows,
    front_table,
    judging_line,
    label,
    predicted_line,
    scores_line,
    split_lines,
    stopped_line,
    to_ascii,
    trial_details,
)
from heretic_kl.search import TrialRecord, knee
from heretic_kl.ui.front_plot import FrontPlot
from heretic_kl.ui.print_tables import print_sections
from heretic_kl.ui.progress import stage_progress
from heretic_kl.ui.terminal import make_console, say

if TYPE_CHECKING:
    from heretic_kl.scoring import Score

WIDE_ENOUGH_FOR_EDITS: Final = 140
WORTH_TIMING: Final = 0.1
"""Seconds; stages below it end without a word."""


def print_front(console: Console, rows: Sequence[FrontRow]) -> None:
    """The front as a table on a terminal, as plain aligned lines elsewhere."""
    console.print()
    if console.is_terminal:
        edits = console.width >= WIDE_ENOUGH_FOR_EDITS
        console.print(front_table(rows, edits=edits, ascii_only=console.options.ascii_only))
    else:
        for line in front_lines(rows, ascii_only=console.options.ascii_only):
            say(console, line)
    for note in front_footnotes(rows):
        say(console, note, "dim")


class ConsoleObserver:
    """Called with every event; shows it or leaves it. A context manager: it settles at the end.

    Args:
        quiet: show notices and results alone.
        console: for progress, trials and notices; by default stderr.
        results: for picks and saved models; by default `console` if given, else stdout.
    """

    def __init__(
        self, *, quiet: bool, console: Console | None = None, results: Console | None = None
    ) -> None:
        self._console = console or make_console(stderr=True)
        self._results = results or console or make_console()
        self._quiet = quiet
        self._progress = stage_progress(self._console)
        self._plot = FrontPlot()

    def __enter__(self) -> ConsoleObserver:
        return self

    def __exit__(self, *error: object) -> None:
        self.settle()

    def settle(self) -> None:
        """Stop whatever moves: somebody else is about to use the terminal."""
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Notice):
            say(self._console, f"note: {event.message}", "yellow")
        elif isinstance(event, TrialPicked):
            self._picked(event)
        elif isinstance(event, ModelSaved):
            self._saved(event)
        elif isinstance(event, ModelUploaded):
            who = "private" if event.private else "PUBLIC"
            say(self._results, f"uploaded {event.folder} to {event.url} ({who})", "bold")
        elif isinstance(event, FrontShown | TrialShown):
            self._shown(event)
        elif self._quiet or isinstance(event, Result | Failed | Ended):
            return
        elif isinstance(event, StageStarted | StageAdvanced | StageFinished):
            self._stage(event)
        elif isinstance(event, TrialFinished):
            self._trial(event)
        else:
            self._fact(event)

    def _shown(self, event: FrontShown | TrialShown) -> None:
        self.settle()
        if isinstance(event, TrialShown):
            print_sections(self._results, trial_details(event.record, event.test_scores))
            return
        rows = front_rows(
            event.front,
            event.tested,
            baseline=event.baseline,
            test_baseline=event.test_baseline,
            like=event.like,
        )
        print_front(self._results, rows)

    def _stage(self, event: StageStarted | StageAdvanced | StageFinished) -> None:
        if isinstance(event, StageStarted):
            self._progress.stop()
            say(self._console, event.title, "bold")
            if event.stage != "upload":  # the hub's client shows its own
                plot = self._plot if event.stage in ("search", "refine") else None
                self._progress.start(event.title, event.steps, plot)
        elif isinstance(event, StageAdvanced):
            self._progress.advance(event)
        else:
            self._progress.stop()
            if event.seconds >= WORTH_TIMING:
                say(self._console, f"  took {duration(event.seconds)}", "dim")

    def _fact(
        self,
        event: ModelLoaded
        | CalibrationStep
        | BaselineMeasured
        | StudyOpened
        | TrialTested
        | ResponsesJudged,
    ) -> None:
        if isinstance(event, ModelLoaded):
            text = (
                f"  {event.name}: {_magnitude(event.parameters)} parameters, {event.layers} "
                f"layers, {event.sites} sites, {event.dtype} on {event.device}"
            )
        elif isinstance(event, CalibrationStep):
            text = f"  {event.name + ':':<24} {event.value}"
        elif isinstance(event, BaselineMeasured):
            text = f"  unedited, {event.use} prompts: {scores_line(event.scores, full=True)}"
        elif isinstance(event, TrialTested):
            scores = scores_line(event.scores, full=True)
            text = f"  trial {event.record.number}, test prompts: {scores}"
        elif isinstance(event, ResponsesJudged):
            self.settle()
            text = f"{label(event.scorer)}, all in all: {judging_line(vars(event))} ({event.by})"
        else:
            held = f"{event.finished} of {event.wanted}" if event.finished else event.wanted
            more = "trials are there already" if event.finished else "trials to run"
            text = f"  study {event.name} in {event.location}: {held} {more}"
        say(self._console, text)

    def _trial(self, event: TrialFinished) -> None:
        record = event.record
        digits = len(str(event.wanted))
        parts = [f"{event.finished:>{digits}}/{event.wanted}", f"trial {record.number:<{digits}}"]
        style = None
        if record.state == "complete":
            parts.append(scores_line(record.scores))
            if any(record.number == other.number for other in event.front):
                parts.append("on the front")
                style = "green"
        elif record.state == "screened":
            parts += [predicted_line(record.predicted), scores_line(record.scores)]
            style = "dim"
        elif record.stopped is not None:
            parts.append(f"stopped: {stopped_line(record.stopped)}")
            style = "dim"
        else:
            parts.append(f"{record.state}: {record.error}" if record.error else record.state)
            style = "red"
        parts.append(duration(record.seconds))
        self._plot.add(record, event.front)
        say(self._console, "  ".join(parts), style)
        self._progress.search(
            event.finished, event.wanted, event.seconds_left, _standing(event.front)
        )

    def _picked(self, event: TrialPicked) -> None:
        self.settle()
        record = event.record
        say(self._results, f"picked trial {record.number} ({event.rule})", "bold")
        say(self._results, f"  {scores_line(record.scores, full=True)}  (validation prompts)")
        for line in split_lines(record.scores):
            say(self._results, f"  {line}")
        say(self._results, f"  {describe_edit(record.edit)}")

    def _saved(self, event: ModelSaved) -> None:
        self.settle()
        what = "merged model" if event.form == "merged" else "LoRA adapter"
        say(self._results, f"saved {what} to {event.folder}", "bold")
        for line in _comparison(event.trial_scores, event.saved_scores, self._results):
            say(self._results, f"  {line}")
        floor = f"what rounding costs an unchanged model ({event.noise_floor:.2g} nats)"
        within = event.merge_kl <= event.noise_floor
        say(
            self._results,
            f"  KL between trial and saved model: {event.merge_kl:.2g} nats, "
            f"{'within' if within else 'MORE than'} {floor}",
            None if within else "yellow",
        )


def _standing(front: Sequence[TrialRecord]) -> list[str]:
    """How the search stands: the front's size with its knee, and the best of each objective."""
    if not front:
        return ["nothing on the front yet"]
    middle = knee(front)
    lines = [f"front {len(front)}, knee trial {middle.number}: {scores_line(middle.scores)}"]
    names = list(front[0].scores)
    if len(front) > 1 and len(names) == len(front[0].objectives):
        best = []
        for position, name in enumerate(names):
            record = min(front, key=lambda trial, at=position: trial.objectives[at])  # type: ignore[misc]
            if name in record.scores:
                best.append(f"{label(name)} {compact(record.scores[name])}")
        lines.append(f"best {'  '.join(best)}")
    return lines


def _comparison(
    trial: Mapping[str, Score], saved: Mapping[str, Score], results: Console
) -> list[str]:
    """Both columns side by side; below one another where there is no room for that."""
    worded = to_ascii if results.options.ascii_only else str
    names = list(dict.fromkeys([*trial, *saved]))
    rows = []
    for name in names:
        texts = [side[name].text if name in side else "not measured" for side in (trial, saved)]
        rows.append([worded(text) for text in (label(name), *texts)])
    lines = align([["test prompts", "trial", "saved model"], *rows])
    if not results.is_terminal or max(map(len, lines)) <= results.width - 2:
        return lines
    stacked = ["test prompts"]
    for name, before, after in rows:
        stacked.extend([name, f"  trial  {before}", f"  saved  {after}"])
    return stacked


def _magnitude(count: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
