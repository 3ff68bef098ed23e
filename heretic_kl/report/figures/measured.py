"""What edits cost and where they act. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from heretic_kl.report.figures.figure import (
    WIDTH,
    Figure,
    Row,
    by_model,
    dash_by_model,
    panels,
    plain_y,
    whole,
)

UNSEEN: Final = "Prompts that neither directions, search nor refinement saw."


def comparison_figure(rows: Sequence[Row], use: str = "test", about: str = UNSEEN) -> Figure:
    """Original and edited models on the prompts of one use, with intervals.

    Args:
        rows: see `score_rows`.
        use: `test` or `validation`.
        about: a sentence on these prompts.
    """
    models = list(dict.fromkeys(row["model"] for row in rows))
    y = {"field": "model", "type": "nominal", "sort": models, "title": None}
    x = {"type": "quantitative", "title": None}
    return Figure(
        name="comparison",
        title=f"Original against edited, on the {use} prompts",
        caption=f"{about} Bars are 95% intervals.".lstrip(),
        summary=" ".join(f"{row['model']}: {row['score']} {row['text']}." for row in rows),
        columns={"score": "score", "model": "model", "value": "value"}
        | {"value_low": "low", "value_high": "high", "text": "in words"},
        rows=rows,
        spec=panels(
            "score",
            list(dict.fromkeys(row["score"] for row in rows)),
            [
                {
                    "mark": {"type": "rule", "strokeWidth": 2, "aria": False},
                    "encoding": {"y": y, "x": {**x, "field": "value_low"}}
                    | {"x2": {"field": "value_high"}, "color": by_model(models)},
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
                    "encoding": {"y": y, "x": {**x, "field": "value"}, "color": by_model(models)}
                    | {"description": {"field": "text"}},
                },
            ],
            height={"step": 24},
        ),
    )


def positions_figure(rows: Sequence[Row]) -> Figure:
    """KL at each position of the response, with its interval; a panel a scorer."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    prompts = " and ".join(sorted({row["prompts"] for row in rows}))
    x = whole("position", [row["position"] for row in rows])
    x["title"] = "position in the response"
    mean = {"field": "mean", "type": "quantitative", "title": "KL (nats)"}
    colour = by_model(models, offset=1)
    scorers = list(dict.fromkeys(row["score"] for row in rows))
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row["score"], row["model"]), []).append(row)
    band = {"x": x, "y": {**mean, "field": "low"}, "y2": {"field": "high"}, "color": colour}
    layer = [
        {"mark": {"type": "area", "opacity": 0.18, "aria": False}, "encoding": band},
        {"mark": {"type": "rule", "opacity": 0.5, "aria": False}, "encoding": band},
        {
            "mark": {"type": "line", "point": {"size": 40}},
            "encoding": {"x": x, "y": mean, "color": colour, "strokeDash": dash_by_model(models)},
        },
    ]
    several = len(scorers) > 1
    return Figure(
        name="positions",
        title="KL at each position",
        caption=f"Mean over {prompts} prompts of the teacher-forced KL(original || edited) at each "
        "position of the original's response. Bands are 95% intervals of the mean.",
        summary=" ".join(
            f"{model}{f', {scorer}' * several}: {line[0]['mean']:.4g} nats at "
            f"position 1, {line[-1]['mean']:.4g} at position {line[-1]['position']}."
            for (scorer, model), line in lines.items()
        ),
        columns={"model": "model", **({"score": "score"} if several else {})}
        | {"position": "position", "mean": "KL, nats", "low": "low", "high": "high"}
        | {"count": "prompts"},
        rows=rows,
        spec=panels("score", scorers, layer, height=180)
        if several
        else {"width": WIDTH, "height": 220, "layer": layer},
    )


def strength_figure(rows: Sequence[Row]) -> Figure:
    """Edit strength over layers and components."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    components = list(dict.fromkeys(row["component"] for row in rows))
    peaks: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["model"], row["component"]
        if key not in peaks or row["strength"] > peaks[key]["strength"]:
            peaks[key] = row
    return Figure(
        name="strength",
        title="Edit strength over layers",
        caption="1 removes the direction from what a component writes, less removes part of it. "
        "Of a refined edit: the Frobenius norm of the learned operator.",
        summary=" ".join(
            f"{model}, {component}: "
            + (
                f"strongest at layer {row['layer']} ({row['strength']:.3g})."
                if row["strength"] > 0
                else "not edited."
            )
            for (model, component), row in peaks.items()
        ),
        columns={"model": "model", "component": "component", "layer": "layer"}
        | {"strength": "strength"},
        rows=rows,
        spec=panels(
            "component",
            components,
            [
                {
                    "mark": {"type": "line", "point": {"size": 14}},
                    "encoding": {
                        "x": whole("layer", [row["layer"] for row in rows]),
                        "y": plain_y("strength"),
                        "color": by_model(models, offset=1),
                        "strokeDash": dash_by_model(models),
                    },
                }
            ],
            height=140,
        ),
    )
