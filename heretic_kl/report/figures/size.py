"""Divergence against size on disk. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from heretic_kl.report.drawing import COLOURS
from heretic_kl.report.figures.figure import (
    QUIET_RULE,
    WIDTH,
    Figure,
    Row,
    Spec,
    log_where_wide,
    nominal,
)

PADDED: Spec = {"scale": {"zero": False, "padding": 40}}
"""Room for the names of the outermost points."""
KINDS = ("on the Pareto line", "dominated")
NEAR_SIZE, NEAR_KL = 0.04, 1.25
"""Share of the largest size, and factor between KLs, within which names cover each other."""


def size_figure(rows: Sequence[Row], levels: Mapping[str, float]) -> Figure:
    """Candidates of one reference, with the line of those that none is smaller and nearer than.

    Args:
        rows: `name`, `size` in MB, `bits` a weight, `kl` in nats with its interval `low`, `high`,
            `pareto`, and `text` for readers.
        levels: lines across, such as what rounding to 8 bits costs; nats by name.
    """
    below = _named_below(rows)
    drawn = [
        {**row, "kind": KINDS[0] if row["pareto"] else KINDS[1], "below": row["name"] in below}
        for row in rows
    ]
    sizes = [row["size"] for row in rows]
    x = _axis("size", "size on disk, MB", log_where_wide(sizes) or PADDED)
    y = _axis("kl", "KL, nats", log_where_wide([*(row["kl"] for row in rows), *levels.values()]))
    colours = nominal("kind", KINDS, [COLOURS[0], COLOURS[5]])
    shapes = nominal("kind", KINDS, ["circle", "diamond"])
    place = {"x": x, "y": y}
    on_line = sorted((row for row in rows if row["pareto"]), key=lambda row: row["size"])
    return Figure(
        name="size",
        title="KL against size",
        caption="KL from the reference against size on disk; lower left is better. The line joins "
        "candidates of which none is both smaller and nearer. Bars are 95% intervals."
        + (" Lines across: the reference's own weights rounded." if levels else ""),
        summary=f"{len(rows)} candidates. On the Pareto line, by size: "
        + "; ".join(row["text"] for row in on_line)
        + ".",
        columns={
            **{"name": "candidate", "size": "size, MB", "bits": "bits per weight"},
            **{"kl": "KL, nats", "low": "low", "high": "high", "kind": "kind", "text": "in words"},
        },
        rows=drawn,
        spec={
            "width": WIDTH,
            "height": 280,
            "layer": [
                *(level_line(name, value, y) for name, value in levels.items()),
                {
                    "transform": [{"filter": "datum.pareto"}],
                    "mark": {"type": "line", "strokeWidth": 1, "aria": False},
                    "encoding": {**place, "order": {"field": "size"}},
                },
                {
                    "mark": QUIET_RULE,
                    "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
                },
                {
                    "mark": {"type": "point", "filled": True, "size": 64, "opacity": 1},
                    "encoding": {**place, "color": colours, "shape": shapes}
                    | {"description": {"field": "text"}},
                },
                *_names(place),
            ],
        },
    )


def _names(place: Spec) -> list[Spec]:
    """The candidates' names beside their points."""
    label = {"type": "text", "fontSize": 10, "limit": 150, "color": "currentColor", "aria": False}
    sides: list[tuple[str, Spec]] = [
        ("!datum.below", {"align": "left", "dx": 6, "dy": -7}),
        ("datum.below", {"align": "right", "dx": -6, "dy": 8}),
    ]
    return [
        {
            "transform": [{"filter": which}],
            "mark": {**label, **where},
            "encoding": {**place, "text": {"field": "name"}},
        }
        for which, where in sides
    ]


def _named_below(rows: Sequence[Row]) -> set[str]:
    """Candidates whose name stands below, since it would cover that of a near one."""
    below: set[str] = set()
    widest = max((row["size"] for row in rows), default=0.0)
    above: list[Row] = []
    for row in sorted(rows, key=lambda row: row["size"]):
        near = any(
            row["size"] - other["size"] < NEAR_SIZE * widest
            and 1 / NEAR_KL < row["kl"] / other["kl"] < NEAR_KL
            for other in above
            if min(row["kl"], other["kl"]) > 0
        )
        if near:
            below.add(row["name"])
        else:
            above.append(row)
    return below


def _axis(field: str, title: str, scale: Spec) -> Spec:
    return {"field": field, "type": "quantitative", "title": title, **scale}


def level_line(name: str, value: float, y: Spec) -> Spec:
    """A dashed line at a height, with its name; `y` is the axis of the other layers."""
    at = {"y": {"datum": value, **{k: v for k, v in y.items() if k in ("scale", "axis", "title")}}}
    text = {"type": "text", "align": "left", "dx": 3, "dy": -6, "fontSize": 10}
    return {
        "data": {"values": [{}]},  # once, not once a row
        "layer": [
            {"mark": {**QUIET_RULE, "strokeDash": [4, 4]}, "encoding": at},
            {
                "mark": {**text, "color": "currentColor", "aria": False},
                "encoding": {**at, "x": {"value": 0}, "text": {"value": name}},
            },
        ],
    }
