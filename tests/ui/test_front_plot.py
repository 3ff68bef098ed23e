"""The front as a plot of characters, and the live view that shows it beside progress."""

import math

import pytest
from emulator import Emulator
from ui_samples import failed, recorded, stopped, trial, written

from heretic_kl.events import StageFinished, StageStarted, TrialFinished
from heretic_kl.search import TrialRecord, pareto_front
from heretic_kl.ui.event_lines import ConsoleObserver
from heretic_kl.ui.front_plot import FrontPlot

TRIALS = (trial(0, 64, 0.001), trial(1, 32, 0.01), trial(2, 0, 0.1), trial(3, 64, 0.1))


@pytest.fixture(autouse=True)
def _drawn_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """No frame is drawn by the clock while the emulated terminal is being resized."""
    monkeypatch.setattr("heretic_kl.ui.live.REFRESHES_PER_SECOND", 1e-3)


def plotted(*trials: TrialRecord, width: int = 60, height: int = 12, ascii_only: bool = True):
    plot = FrontPlot()
    for index, record in enumerate(trials):
        plot.add(record, pareto_front(trials[: index + 1]))
    return [line.plain for line in plot.lines(width, height, ascii_only=ascii_only)]


def test_points_stand_where_their_values_are() -> None:
    legend, *rows, axis, ends = plotted(*TRIALS)
    assert legend == "refusals against KL (log)  @ knee o front . other"
    assert len(rows) == 9 and axis.strip().strip("-") == "+"
    start = rows[0].index("|") + 1
    marks = {
        (row, column - start): sign
        for row, line in enumerate(rows)
        for column, sign in enumerate(line)
        if sign in "@o." and column >= start
    }
    last = len(axis) - start - 1
    # log scale: 0.01 lies in the middle of 0.001 and 0.1, and 32 of 64 in the middle of the rows
    assert marks == {(0, 0): "o", (4, round(last / 2)): "@", (8, last): "o", (0, last): "."}
    assert rows[0].startswith("100% |") and rows[-1].startswith("  0% |")
    assert ends.split() == ["0.001", "0.1"]


def test_values_of_one_magnitude_are_on_a_linear_scale() -> None:
    legend, *rows, _, ends = plotted(trial(0, 64, 0.1), trial(1, 0, 0.3), trial(2, 32, 0.2))
    assert "log" not in legend and ends.split() == ["0.1", "0.3"]
    assert {len(line) for line in rows if "o" in line or "@" in line} == {7, 34, 60}


def test_what_was_not_measured_by_responses_is_marked_as_predicted() -> None:
    scores = {"teacher_forced_kl": TRIALS[1].scores["teacher_forced_kl"]}
    screened = TrialRecord(9, "screened", {}, None, scores, predicted={"refusals": 0.75})
    legend, *rows, _, _ = plotted(*TRIALS[:3], screened)
    assert ", predicted" in legend and "," in rows[2]


@pytest.mark.parametrize(
    "trials",
    [(), TRIALS[:1], (failed(0), stopped(1)), (trial(0, 1, math.nan), trial(1, 1, 0.1))],
)
def test_fewer_than_two_points_are_no_plot(trials: tuple[TrialRecord, ...]) -> None:
    assert plotted(*trials) == []


@pytest.mark.parametrize(("width", "height"), [(39, 12), (60, 4), (0, 0)])
def test_no_plot_where_there_is_no_room(width: int, height: int) -> None:
    assert plotted(*TRIALS, width=width, height=height) == []


@pytest.mark.parametrize("means", [(0.0, 0.0), (0.0, 0.5, 0.001), (0.2, 0.2, 0.2)])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_any_values_fit(means: tuple[float, ...], ascii_only: bool) -> None:
    trials = [trial(number, number, mean) for number, mean in enumerate(means)]
    lines = plotted(*trials, width=40, height=6, ascii_only=ascii_only)
    assert len(lines) == 6 and all(len(line) <= 40 for line in lines)
    assert all(line.isascii() for line in lines) is ascii_only


def search(observer: ConsoleObserver, *, finish: bool = True) -> None:
    observer(StageStarted("search", "Searching", len(TRIALS)))
    for index, record in enumerate(TRIALS):
        front = pareto_front(TRIALS[: index + 1])
        observer(TrialFinished(record, index + 1, len(TRIALS), front, 60.0))
    if finish:
        observer(StageFinished("search", 1.0))


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [(80, 24, True), (120, 40, True), (80, 19, False), (59, 24, False)],
)
def test_the_live_view_plots_where_there_is_room(width: int, height: int, shown: bool) -> None:
    terminal = Emulator(width, height)
    with ConsoleObserver(quiet=False, console=terminal.console) as observer:
        search(observer, finish=False)
        text = "\n".join(terminal.lines)
        assert ("refusals against KL (log)" in text) is shown
        assert text.count("◆") == 2 * shown, "in the legend and at the knee"
        assert "4/4" in text and "front 3, knee trial 1" in text
        assert sum("trial 3  refusals" in line for line in terminal.lines) == 1
    assert not any("against" in line or "front 3" in line for line in terminal.lines)


@pytest.mark.parametrize("width", [40, 60, 100])
def test_the_live_view_survives_resizing(width: int) -> None:
    terminal = Emulator(90, 30)
    with ConsoleObserver(quiet=False, console=terminal.console) as observer:
        search(observer, finish=False)
        terminal.resize(width)
        observer(TrialFinished(TRIALS[3], 4, 4, pareto_front(TRIALS), 60.0))
        text = "\n".join(terminal.lines)
        assert text.count("refusals against") == (width >= 60)
        assert text.count("front 3, knee") == 1
    assert not any("against" in line or "knee" in line for line in terminal.lines)


def test_without_a_terminal_nothing_is_plotted() -> None:
    console = recorded(terminal=False)
    with ConsoleObserver(quiet=False, console=console) as observer:
        search(observer)
    assert "against" not in written(console) and "front 3, knee trial 1" in written(console)
