"""Draws the page's figures from what was analysed. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.study_kl_tokens.edits import ABLATIONS, LEARNED
from benchmarks.study_kl_tokens.page.view import model_title
from benchmarks.study_kl_tokens.task import POSITIONS
from benchmarks.study_kl_tokens.variants import MAIN, MEASURES

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend is chosen first)

COLORS = {"all edits": "#7a7a7a", "ablations and learned": "#0b5fa5", "useful": "#c4621b"}
KINDS = {
    "ablation": ("#0b5fa5", "o", ABLATIONS),
    "learned": ("#2a8c4a", "^", (LEARNED,)),
    "weights": ("#c4621b", "x", ("noise", "rounding", "fine-tune")),
}
Model = Mapping[str, Any]


def draw_all(models: Sequence[Model], folder: Path) -> list[Path]:
    """Draw every figure, as SVG whose text stays text."""
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "kl_tokens", "font.size": 9}
    drawings = {
        "correlation": correlation(models),
        "measures": measures(models[0]),
        "scatter": scatter(models[0]),
        "precision": precision(models[0]),
    }
    files = []
    for name, drawn in drawings.items():
        files.append(folder / f"kl_tokens_{name}.svg")
        drawn.savefig(files[-1], metadata={"Date": None})
        pyplot.close(drawn)
    return files


def correlation(models: Sequence[Model]) -> Any:
    """Correlation with the composite by N, with intervals; a panel a model."""
    drawn, panels = pyplot.subplots(
        1, len(models), figsize=(5.2 * len(models), 3.8), layout="constrained", squeeze=False
    )
    for axes, model in zip(panels[0], models, strict=True):
        for name, group in model["groups"].items():
            if group is None or (name == "useful" and model["regret"] is None):
                continue
            points = [group["spearman"][f"{MAIN}, {n}"]["composite"] for n in POSITIONS]
            label = f"{name} ({group['edits']})"
            axes.plot(
                POSITIONS, [p["value"] for p in points], "o-", color=COLORS[name], label=label
            )
            bounds = [[p[end] for p in points] for end in ("low", "high")]
            axes.fill_between(POSITIONS, *bounds, color=COLORS[name], alpha=0.12, linewidth=0)
        free = model["groups"]["all edits"]["spearman"]
        values = [free[f"free-running, {n}"]["composite"]["value"] for n in POSITIONS]
        axes.plot(POSITIONS, values, ":", color="black", label="free-running, all edits")
        _positions(axes)
        axes.set_ylabel("Spearman's correlation with composite damage")
        axes.set_title(f"{model_title(model['model'])}: {model['edits']} edits")
        axes.legend(frameon=False, loc="lower left")
    return drawn


def measures(model: Model) -> Any:
    """Correlation of KL at each N with each measure of damage, as a table in colours."""
    group = model["groups"]["ablations and learned"] or model["groups"]["all edits"]
    names = ("composite", *MEASURES)
    values = [[group["spearman"][f"{MAIN}, {n}"][m]["value"] for n in POSITIONS] for m in names]
    drawn, axes = pyplot.subplots(figsize=(6.5, 5), layout="constrained")
    image = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            color = "white" if abs(value) > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(POSITIONS)), [str(n) for n in POSITIONS])
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("positions, N")
    axes.set_title(f"{model_title(model['model'])}, ablations and learned edits ({group['edits']})")
    drawn.colorbar(image, label="Spearman's correlation")
    return drawn


def scatter(model: Model) -> Any:
    """Composite damage over KL at 1, 3 and 16 positions; each edit a point."""
    drawn, panels = pyplot.subplots(1, 3, figsize=(11, 3.8), layout="constrained", sharey=True)
    for axes, tokens in zip(panels, (1, 3, 16), strict=True):
        for name, (color, marker, families) in KINDS.items():
            points = [p for p in model["scatter"] if p["family"] in families]
            values = [max(p[f"kl_{tokens}"], 1e-6) for p in points]
            damage = [p["composite"] for p in points]
            axes.scatter(values, damage, s=16, color=color, marker=marker, label=name)
        axes.set_xscale("log")
        axes.set_xlabel(f"KL over {tokens} position{'s' if tokens > 1 else ''}, nats")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("composite damage (mean rank)")
    panels[0].legend(frameon=False, loc="upper left")
    return drawn


def precision(model: Model) -> Any:
    """Correlation against the seconds of a pass; a line a number of prompts, points along N."""
    drawn, axes = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    cells = model["precision"]["cells"]
    for prompts in sorted({cell["prompts"] for cell in cells}):
        line = [cell for cell in cells if cell["prompts"] == prompts]
        seconds, values = [c["seconds"] for c in line], [c["spearman"] for c in line]
        axes.plot(seconds, values, "o-", markersize=4, label=f"{prompts} prompts")
        for cell in line:
            place = (cell["seconds"], cell["spearman"])
            axes.annotate(str(cell["tokens"]), place, (2, 3), textcoords="offset points", size=7)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("CPU seconds of a pass, one thread (labels: positions)")
    axes.set_ylabel("mean correlation with composite damage")
    axes.set_title(f"{model_title(model['model'])}, ablations and learned edits")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return drawn


def _positions(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(POSITIONS, [str(n) for n in POSITIONS])
    axes.set_xlabel("positions, N")
    axes.spines[["top", "right"]].set_visible(False)
