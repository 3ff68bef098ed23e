"""How far the residuals of two groups of prompts lie apart. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

from heretic_kl.report.drawing import COLOURS
from heretic_kl.report.figures.figure import (
    WIDTH,
    Figure,
    Row,
    Spec,
    by_model,
    dash_by_model,
    log_where_wide,
    nominal,
    panels,
    whole,
)


def separation_figure(rows: Sequence[Row], groups: str) -> Figure:
    """How well the groups of prompts are separated, layer by layer."""
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    best = {m: max((r for r in rows if r["measure"] == m), key=_value) for m in measures}
    return Figure(
        name="separation",
        title="Separation of the directions",
        caption=f"How far the residuals of {groups} prompts lie apart after each layer. AUROC: "
        "how well a direction tells held-out prompts apart (0.5 is chance). Silhouette: -1 to 1. "
        "Cosine of the means: between the two mean residuals. Distance / norm: length of the "
        "difference of the means over the mean length of a residual.",
        summary=" ".join(
            f"{measure}: largest at layer {row['layer']} ({row['value']:.3g})."
            for measure, row in best.items()
        ),
        columns={"measure": "measure", "layer": "layer", "value": "value"},
        rows=rows,
        spec=panels("measure", measures, [_layer_line("value", rows)], height=110, columns=2),
    )


def norms_figure(rows: Sequence[Row]) -> Figure:
    """The lengths of residuals and of the difference of means."""
    of = list(dict.fromkeys(row["of"] for row in rows))
    mark = _layer_line("length", rows)
    lengths = [row["length"] for row in rows]
    mark["encoding"]["y"] |= {"title": "length", **log_where_wide(lengths)}
    mark["encoding"] |= {"color": by_model(of), "strokeDash": dash_by_model(of)}
    for channel in ("color", "strokeDash"):
        mark["encoding"][channel] = {**mark["encoding"][channel], "field": "of"}
    last = {row["of"]: row for row in rows}
    return Figure(
        name="norms",
        title="Norms of the residuals",
        caption="Length of a residual after each layer, averaged over prompts, and length of the "
        "difference between the two groups' means.",
        summary=" ".join(
            f"{of}: {row['length']:.4g} after layer {row['layer']}." for of, row in last.items()
        ),
        columns={"of": "length of", "layer": "layer", "length": "length"},
        rows=rows,
        spec={"width": WIDTH, "height": 180, **mark},
    )


def projection_figure(rows: Sequence[Row]) -> Figure:
    """The residuals of some layers in a plane."""
    groups = list(dict.fromkeys(row["prompts"] for row in rows))
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    axis = {"type": "quantitative", "axis": {"labels": False, "ticks": False, "title": None}}
    return Figure(
        name="projection",
        title="Residuals in a plane",
        caption="Last-token residuals of the training prompts on their first two principal "
        "components, layer by layer; axes have no unit. Two groups that lie apart here are far "
        "apart in the model.",
        summary=f"{' and '.join(groups)} prompts at {', '.join(layers)}.",
        columns={"layer": "layer", "prompts": "prompts", "x": "component 1", "y": "component 2"},
        rows=rows,
        spec=panels(
            "layer",
            layers,
            [
                {
                    "mark": {"type": "point", "filled": True, "size": 22, "aria": False},
                    "encoding": {
                        "x": {"field": "x", **axis},
                        "y": {"field": "y", **axis},
                        "color": nominal("prompts", groups, [COLOURS[1], COLOURS[0]]),
                        "shape": nominal("prompts", groups, ["triangle-up", "circle"]),
                    },
                }
            ],
            height=150,
            columns=2,
        ),
    )


def _layer_line(field: str, rows: Sequence[Row]) -> Spec:
    return {
        "mark": {"type": "line", "point": {"size": 12}, "color": COLOURS[0]},
        "encoding": {
            "x": whole("layer", [row["layer"] for row in rows]),
            "y": {"field": field, "type": "quantitative", "title": None, "scale": {"zero": False}},
        },
    }


def _value(row: Row) -> float:
    return float(row["value"])
