"""Draws refusals against KL of every tool's choices, from the results file. Measures nothing.

python -m benchmarks.search_quality.plot benchmarks/results/search_quality.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.search_quality.results import Run
from benchmarks.search_quality.table import TARGET, TOOLS, Point, points

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
}
MARKERS = "osD^vP"
"""One a budget, shortest first."""


def draw(axes: Any, point: Point, marker: str) -> None:
    """A point, with its standard error over prompts and the 95% interval of its refusals."""
    low, high = point.interval
    rate = 100 * point.rate
    axes.errorbar(
        point.kl,
        rate,
        # Bars are drawn to a positive end on the logarithmic axis.
        xerr=[[min(point.kl_error, 0.9 * point.kl)], [point.kl_error]],
        yerr=[[max(0.0, rate - 100 * low)], [max(0.0, 100 * high - rate)]],
        marker=marker,
        color=COLORS.get(point.tool, "#555555"),
        markersize=6,
        linewidth=1,
        capsize=2,
    )


def figure(runs: list[Run]) -> Any:
    """One panel a model, each tool a colour, each budget a marker.

    Raises:
        SystemExit: nothing was judged.
    """
    all_points = points(runs)
    if not all_points:
        raise SystemExit("nothing to draw: no candidate was judged")
    models = list(dict.fromkeys(point.model for point in all_points))
    budgets = sorted({point.minutes for point in all_points})
    markers = {minutes: MARKERS[i % len(MARKERS)] for i, minutes in enumerate(budgets)}
    size = (5.2 * len(models) + 1.5, 4.6)
    drawn, panels = pyplot.subplots(
        1, len(models), figsize=size, squeeze=False, layout="constrained"
    )
    for axes, model in zip(panels[0], models, strict=True):
        for point in all_points:
            if point.model == model:
                draw(axes, point, markers[point.minutes])
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
    drawn.legend(handles=_legend(all_points, markers), loc="outside right upper", frameon=False)
    return drawn


def _legend(all_points: list[Point], markers: dict[float, str]) -> list[Line2D]:
    seen = {point.tool for point in all_points}
    tools = [
        Line2D([], [], color=COLORS.get(tool, "#555555"), linewidth=3, label=TOOLS.get(tool, tool))
        for tool in sorted(seen, key=list(TOOLS).index)
    ]
    budgets = [
        Line2D([], [], color="#555555", marker=marker, linestyle="", label=f"{minutes:g} minutes")
        for minutes, marker in markers.items()
    ]
    return tools + budgets


def save(runs: list[Run], out: Path = OUT) -> None:
    """Draw to a file; text stays text, and the file is the same when the figures are."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "search_quality"}
    drawn = figure(runs)
    drawn.savefig(out, metadata={"Date": None})
    pyplot.close(drawn)


def main() -> None:
    """Draw a results file."""
    parser = argparse.ArgumentParser(description="Draw refusals against KL of every tool.")
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    words = parser.parse_args()
    save(json.loads(words.results.read_text(encoding="utf-8"))["runs"], words.out)
    print(words.out)


if __name__ == "__main__":
    main()
