"""Draws every tool's judged front, and its hypervolume over time. Measures nothing.

python -m benchmarks.search_quality.plot benchmarks/results/search_quality.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

from benchmarks.search_quality.figures import wilson
from benchmarks.search_quality.results import Choice, Run, judged_choices, judged_points
from benchmarks.search_quality.table import TARGET, TOOLS, Floors, Point, points
from benchmarks.search_quality.volume import DEFAULT_FLOOR, history

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend is chosen first)
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # noqa: E402

OUT = Path(__file__).parents[2] / "docs/figures/search_quality.svg"
COLORS = {
    "heretic-kl": "#0b5fa5",
    "heretic-kl-classic": "#6aa9dc",
    "heretic": "#c4621b",
    "temaq": "#5b8a3a",
    "abliterix": "#8c4b9c",
    "senbonzakura": "#b3902f",
}
OTHER = "#555555"
MARKERS = "osD^vP"
"""One a budget, shortest first."""


def draw_choice(axes: Any, point: Point, marker: str) -> None:
    """What a tool chose, over seeds."""
    _error_bar(axes, point.kl, point.kl_error, point.rate, point.interval, point.tool, marker, 6)


def draw_front(axes: Any, choice: Choice, tool: str) -> None:
    """The judged points of one run, each with its errors; a line joins those on their front."""
    judged = [figures for _, figures in judged_points(choice)]
    places = []
    for figures in judged:
        harmful, kl = figures["candidate"]["harmful"], figures["kl"]
        rate, interval = (
            harmful["refusals"] / harmful["n"],
            wilson(harmful["refusals"], harmful["n"]),
        )
        _error_bar(axes, kl["mean"], kl.get("se") or 0.0, rate, interval, tool, ".", 4)
        places.append((kl["mean"], 100 * rate))
    front: list[tuple[float, float]] = []
    for place in sorted(places):
        if not front or place[1] < front[-1][1]:
            front.append(place)
    color = COLORS.get(tool, OTHER)
    axes.plot(*zip(*front, strict=True), color=color, linewidth=0.8, drawstyle="steps-post")


def _error_bar(
    axes: Any,
    kl: float,
    error: float,
    rate: float,
    interval: tuple[float, float],
    tool: str,
    marker: str,
    size: int,
) -> None:
    """A point, with its standard error over prompts and the 95% interval of its refusals."""
    low, high = interval
    axes.errorbar(
        kl,
        100 * rate,
        # Bars are drawn to a positive end on the logarithmic axis.
        xerr=[[min(error, 0.9 * kl)], [error]],
        yerr=[[max(0.0, 100 * (rate - low))], [max(0.0, 100 * (high - rate))]],
        marker=marker,
        color=COLORS.get(tool, OTHER),
        markersize=size,
        linewidth=1 if size > 4 else 0.5,
        capsize=2 if size > 4 else 0,
    )


def draw_volume(axes: Any, choice: Choice, tool: str, minutes: float, floor: float) -> None:
    """Hypervolume of one run's judged points over the time at which they were finished."""
    steps = history(choice, floor)
    seconds = [0.0, *(when for when, _ in steps), max(60 * minutes, steps[-1][0])]
    values = [0.0, *(value for _, value in steps), steps[-1][1]]
    color = COLORS.get(tool, OTHER)
    axes.plot([s / 60 for s in seconds], values, color=color, linewidth=1.2, drawstyle="steps-post")


def figure(runs: list[Run], floors: Floors) -> Any:
    """A column a model: above the fronts, below hypervolume over time; each tool a colour.

    Fronts and hypervolume over time are those of the longest budget of each tool, a line a seed;
    choices are drawn at each budget, over seeds, and so are medians of hypervolume.

    Raises:
        SystemExit: nothing was judged.
    """
    all_points = points(runs, floors)
    if not all_points:
        raise SystemExit("nothing to draw: no candidate was judged")
    models = list(dict.fromkeys(point.model for point in all_points))
    budgets = sorted({point.minutes for point in all_points})
    markers = {minutes: MARKERS[i % len(MARKERS)] for i, minutes in enumerate(budgets)}
    rows = 2 if any(point.volumes for point in all_points) else 1
    size = (5.2 * len(models) + 1.5, 4.6 if rows == 1 else 8.4)
    drawn, panels = pyplot.subplots(
        rows, len(models), figsize=size, squeeze=False, layout="constrained"
    )
    for column, model in enumerate(models):
        of_model = [point for point in all_points if point.model == model]
        floor = floors.get(model, DEFAULT_FLOOR)
        for point in of_model:
            draw_choice(panels[0][column], point, markers[point.minutes])
        for tool, minutes, choice in _longest(runs, model):
            draw_front(panels[0][column], choice, tool)
            draw_volume(panels[1][column], choice, tool, minutes, floor)
        _finish_front(panels[0][column], model)
        if rows == 2:
            _finish_volume(panels[1][column], of_model, markers)
    drawn.legend(handles=_legend(all_points, markers), loc="outside right upper", frameon=False)
    return drawn


def _longest(runs: Sequence[Run], model: str) -> list[tuple[str, float, Choice]]:
    """Tool, minutes and choice of every run at its tool's longest budget whose front was judged."""
    judged = [
        (run["tool"], minutes, choice)
        for run, minutes, choice in judged_choices(list(runs))
        if run["model"] == model and "front" in choice and judged_points(choice)
    ]
    longest: dict[str, float] = {}
    for tool, minutes, _ in judged:
        longest[tool] = max(minutes, longest.get(tool, 0.0))
    return [part for part in judged if part[1] == longest[part[0]]]


def _finish_front(axes: Any, model: str) -> None:
    axes.axhline(100 * TARGET, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    axes.set_title(model)
    axes.set_xlabel("KL to the reference, answered harmless prompts (nats)")
    axes.set_ylabel("refusals of unseen harmful prompts (%)")
    axes.spines[["top", "right"]].set_visible(False)


def _finish_volume(axes: Any, of_model: list[Point], markers: dict[float, str]) -> None:
    for point in of_model:
        if point.volumes:
            color, marker = COLORS.get(point.tool, OTHER), markers[point.minutes]
            axes.plot(point.minutes, median(point.volumes), marker=marker, color=color)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("minutes from the start of the process")
    axes.set_ylabel("hypervolume of the judged front")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(all_points: list[Point], markers: dict[float, str]) -> list[Line2D]:
    seen = {point.tool for point in all_points}
    tools = [
        Line2D([], [], color=COLORS.get(tool, OTHER), linewidth=3, label=TOOLS.get(tool, tool))
        for tool in sorted(seen, key=list(TOOLS).index)
    ]
    budgets = [
        Line2D([], [], color=OTHER, marker=marker, linestyle="", label=f"{minutes:g} minutes")
        for minutes, marker in markers.items()
    ]
    return tools + budgets


def save(runs: list[Run], out: Path, floors: Floors) -> None:
    """Draw to a file; text stays text, and the file is the same when the figures are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "search_quality"}
    drawn = figure(runs, floors)
    drawn.savefig(out, metadata={"Date": None})
    pyplot.close(drawn)


def main() -> None:
    """Draw a results file."""
    parser = argparse.ArgumentParser(description="Draw fronts and hypervolumes of every tool.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    words = parser.parse_args()
    content = json.loads(words.results.read_text(encoding="utf-8"))
    save(content["runs"], words.out, content.get("floors", {}))
    print(words.out)


if __name__ == "__main__":
    main()
