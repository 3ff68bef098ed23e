"""Draws how a trial's seconds grow, from what `engine.py` measured: `python benchmarks/plots.py`.

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from machine import results_file

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend is chosen first)

OUT = Path(__file__).parent.parent / "docs/figures/engine_costs.svg"
COLORS = {"bfloat16": "#0b5fa5", "float32": "#c4621b"}
Curve = dict[float, float]


def curve(result: dict[str, Any], name: str) -> Curve:
    """Seconds by size; JSON has made words of the sizes."""
    return {float(size): float(seconds) for size, seconds in result[name].items()}


def line_through(points: Curve) -> tuple[float, float]:
    """Slope and value at 0 of the least-squares line."""
    return statistics.linear_regression(list(points), list(points.values()))


def draw(axes: Any, points: Curve, fitted: Curve, label: str, color: str) -> None:
    """Measured points and the line fitted to them."""
    axes.plot(list(points), list(points.values()), "o", color=color, markersize=4)
    axes.plot(list(fitted), list(fitted.values()), "-", color=color, linewidth=1.2, label=label)


def straight(axes: Any, points: Curve, unit: str, dtype: str) -> None:
    """A curve that grows with its size by so much a unit."""
    slope, zero = line_through(points)
    fitted = {size: zero + slope * size for size in (min(points), max(points))}
    label = f"{dtype}: {slope * 1000:.3g} ms a {unit}"
    draw(axes, points, fitted, label, COLORS[dtype])


def by_prompts(axes: Any, result: dict[str, Any]) -> None:
    """Seconds over prompts."""
    points = curve(result, "seconds_by_prompts_8_positions_from_layer_12")
    straight(axes, points, "prompt", result["dtype"])
    axes.set_title("Prompts (8 positions, edited from layer 12)")
    axes.set_xlabel("prompts")
    axes.set_ylabel("seconds a trial")


def by_layers(axes: Any, result: dict[str, Any]) -> None:
    """Seconds over layers that run, which are those from the first edited one on."""
    first = curve(result, "seconds_by_first_edited_layer_80_prompts_8_positions")
    points = {result["layers"] - layer: seconds for layer, seconds in first.items()}
    straight(axes, dict(sorted(points.items())), "layer", result["dtype"])
    axes.set_title(f"Layers run, of {result['layers']} (80 prompts, 8 positions)")
    axes.set_xlabel("layers run")
    axes.set_ylabel("seconds a trial")


def by_positions(axes: Any, result: dict[str, Any]) -> None:
    """Seconds over scored positions."""
    points = curve(result, "seconds_by_positions_40_prompts_all_layers")
    straight(axes, points, "position", result["dtype"])
    without = curve(result, "seconds_by_positions_without_shared_prefix")
    color = COLORS[result["dtype"]]
    label = f"{result['dtype']}, prefix not shared"
    axes.plot(list(without), list(without.values()), "x", color=color, markersize=6, label=label)
    axes.set_title("Scored positions (40 prompts, all layers edited)")
    axes.set_xlabel("positions of each prompt")
    axes.set_ylabel("seconds a trial")


def by_candidates(axes: Any, result: dict[str, Any]) -> None:
    """Seconds a candidate over candidates side by side, as measured, and of one more of them."""
    each = curve(result, "seconds_a_candidate_by_candidates_at_once_40_prompts_from_layer_12")
    slope, _ = line_through({count: count * seconds for count, seconds in each.items()})
    dtype = result["dtype"]
    label = f"{dtype}: {slope * 1000:.0f} ms for one more"
    draw(axes, each, each, label, COLORS[dtype])
    axes.set_title("Candidates side by side (40 prompts, from layer 12)")
    axes.set_xlabel("candidates at once, K")
    axes.set_ylabel("seconds a candidate")


def figure(results: list[dict[str, Any]]) -> Any:
    """All four panels; each dtype a colour."""
    drawn, panels = pyplot.subplots(2, 2, figsize=(9.5, 7), layout="constrained")
    for axes, panel in zip(
        panels.flat, (by_prompts, by_layers, by_positions, by_candidates), strict=True
    ):
        for result in results:
            panel(axes, result)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    machine = results[0]["machine"]
    drawn.suptitle(
        f"Teacher-forced trials of the demo model (135M), {machine['processor']}, "
        f"{machine['threads']} threads",
        fontsize=11,
    )
    return drawn


def main() -> None:
    """Draw what has been measured."""
    files = [results_file("engine", dtype) for dtype in COLORS]
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    if not results:
        raise SystemExit("nothing to draw: run python benchmarks/engine.py first")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    # Text stays text, and the file is the same when the figures are.
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "engine_costs"}
    figure(results).savefig(OUT, metadata={"Date": None})
    print(OUT)


if __name__ == "__main__":
    main()
