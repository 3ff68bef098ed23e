"""The front, and what refinement gained. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from heretic_kl.report.drawing import COLOURS
from heretic_kl.report.figures.figure import (
    LINKED,
    QUIET_RULE,
    WIDTH,
    Figure,
    Row,
    Spec,
    by_model,
    log_where_wide,
    nominal,
    points,
)
from heretic_kl.report.figures.size import level_line
from heretic_kl.report.planes import Plane

KINDS: Final = {
    "searched, dominated": (COLOURS[5], "circle"),
    "searched, on the front": (COLOURS[0], "circle"),
    "refined, dominated": (COLOURS[3], "diamond"),
    "refined, on the front": (COLOURS[1], "diamond"),
    "searched, predicted": (COLOURS[5], "circle"),
    "refined, predicted": (COLOURS[3], "diamond"),
}
"""Colour and shape of a trial in the front, by kind."""
SHAPES: Final = ("circle", "diamond", "square", "triangle-up", "cross", "triangle-down")

HOLLOW: Final = (
    "Hollow marks are screened trials, which generated no responses: in place of a count they show "
    "what teacher forcing predicts, the probability that a response opens with a refusal. They "
    "have no interval there and are never on the front."
)


def front_figure(rows: Sequence[Row], plane: Plane, limits: Row) -> Figure:
    """The Pareto front in a plane of two objectives.

    Args:
        rows: see `front_rows_of`.
        plane: the objectives.
        limits: `original` and `target` on the y axis, where there are any.
    """
    x_title, y_title = plane.titles
    x = _x(x_title, scale=log_where_wide([row["x"] for row in rows]))
    y = _y(y_title, rows, limits)
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    colours = {kind: KINDS[kind][0] for kind in kinds}
    hollow = {row["kind"] for row in rows if row["predicted"]}
    marks = {
        "mark": {"type": "point", "size": 64, "strokeWidth": 1.5},
        "encoding": {
            "x": x,
            "y": y,
            **points("kind", colours, [KINDS[kind][1] for kind in kinds], hollow),
            "opacity": {
                "condition": {"test": "datum.front || datum.predicted", "value": 1},
                "value": 0.55,
            },
            **LINKED,
        },
    }
    on_front = {"transform": [{"filter": "datum.front"}]}
    bars = [{**on_front, **bar} for bar in _error_bars(x, y)]
    line = {
        **on_front,
        "mark": {"type": "line", "strokeWidth": 1, "color": COLOURS[0], "aria": False},
        "encoding": {"x": x, "y": y, "order": {"field": "x"}},
    }
    lines = [line] if plane.planes == 1 else []  # of more objectives it is no line in a plane
    front = [row for row in rows if row["front"]]
    predicted = sum(row["predicted"] for row in rows)
    best = sorted(front, key=lambda row: row["y"], reverse=plane.better.startswith("upper"))[:6]
    rules = [level_line(name, value, {}) for name, value in limits.items()]
    return Figure(
        name=plane.name("front"),
        title=plane.title("Pareto front"),
        caption=f"{y_title} against {x_title} of every complete trial on the validation prompts; "
        f"{plane.better} is better. "
        + f"The front is that of all {plane.planes + 1} objectives. " * (plane.planes > 1)
        + "Bars of trials on the front are 95% intervals. "
        + f"{HOLLOW} " * bool(predicted)
        + "Select a point to go to its trial.",
        summary=f"{len(rows) - predicted} complete trials, {len(front)} on the front"
        + f"; {predicted} screened, with what is predicted" * bool(predicted)
        + f". {'; '.join(row['text'] for row in best)}.",
        columns={
            **{"trial": "trial", "kind": "kind", "x": x_title, "x_low": "low", "x_high": "high"},
            **{"y": y_title, "y_low": "low", "y_high": "high"},
            **{"like": "cannot be told from"},
        },
        rows=rows,
        spec={"width": WIDTH, "height": 280, "layer": [*lines, *rules, *bars, marks]},
    )


def candidates_figure(rows: Sequence[Row], plane: Plane, use: str) -> Figure:
    """Original and candidates in a plane of two objectives.

    Args:
        rows: `model`, `kind`, `front`, `x` and `y` with `_low` and `_high`, `text`, `link`.
        plane: the objectives.
        use: which prompts.
    """
    x_title, y_title = plane.titles
    x = _x(x_title, scale={"scale": {"zero": True}})
    y = _y(y_title, rows, {})
    models = [row["model"] for row in rows]
    place = {"x": x, "y": y}
    line = {"type": "line", "strokeWidth": 1, "color": "currentColor", "opacity": 0.6}
    return Figure(
        name=plane.name("front"),
        title=plane.title("Pareto front"),
        caption=f"{y_title} against {x_title} on the {use} prompts; {plane.better} is better. The "
        "line joins the models that no other one beats in both. Bars are 95% intervals. Select a "
        "point to go to its figures.",
        summary="; ".join(row["text"] for row in rows) + ".",
        columns={
            **{"model": "model", "kind": "kind", "x": x_title, "x_low": "low", "x_high": "high"},
            **{"y": y_title, "y_low": "low", "y_high": "high"},
        },
        rows=rows,
        spec={
            "width": WIDTH,
            "height": 280,
            "layer": [
                {
                    "transform": [{"filter": "datum.front"}],
                    "mark": {**line, "aria": False},
                    "encoding": {**place, "order": {"field": "x"}},
                },
                *_error_bars(x, y),
                {
                    "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                    "encoding": {
                        **place,
                        "color": by_model(models),
                        "shape": nominal("model", models, _shapes(len(models))),
                        **LINKED,
                    },
                },
            ],
        },
    )


def refinement_figure(rows: Sequence[Row], plane: Plane) -> Figure:
    """Every refined trial, joined to the trial that it started from."""
    x_title, y_title = plane.titles
    values = [row[key] for row in rows for key in ("x", "x_before")]
    x, y = _x(x_title, scale=log_where_wide(values)), _y(y_title, rows, {})
    before = {"x": {**x, "field": "x_before"}, "y": {**y, "field": "y_before"}}
    ends = {"x2": {"field": "x"}, "y2": {"field": "y"}}
    path = {"type": "rule", "color": COLOURS[0], "strokeDash": [5, 3], "aria": False}
    start = {"type": "point", "size": 60, "stroke": COLOURS[5], "strokeWidth": 1.5}
    filled = {
        "condition": {"test": "datum.predicted", "value": "transparent"},
        "value": COLOURS[5],
    }
    refined = {"type": "point", "size": 60, "filled": True, "shape": "diamond"}
    label = {"type": "text", "dx": 9, "dy": -9, "fontSize": 11}
    label |= {"color": "currentColor", "aria": False}
    return Figure(
        name=plane.name("refined"),
        title=plane.title("Refined against unrefined"),
        caption="From the trial that refinement started from (circle) to the refined trial "
        "(diamond, numbered, with its 95% intervals), on the validation prompts; "
        f"{plane.better} is better."
        + " A hollow circle is a start that was screened: what it did not count is predicted."
        * any(row["predicted"] for row in rows),
        summary=" ".join(
            f"Trial {row['trial']}, refined from trial {row['start']} in {row['steps']} steps: "
            f"{y_title} {row['y_before_text']} before, {row['y_text']} after; "
            f"{x_title} {row['x_before_text']} before, {row['x_text']} after."
            for row in rows
        ),
        columns={
            **{"trial": "trial", "start": "from trial", "form": "learned", "steps": "steps"},
            **{"mass_limit": "refusal mass limit", "loss": "learned with"},
            **{"y_before_text": f"{y_title} before", "y_text": "after"},
            **{"x_before_text": f"{x_title} before", "x_text": "after"},
        },
        rows=rows,
        spec={
            "width": WIDTH,
            "height": 220,
            "layer": [
                *_error_bars(x, y),
                {"mark": path, "encoding": {**before, **ends}},
                {
                    "mark": start,
                    "encoding": {**before, "fill": filled, "description": {"field": "before_text"}},
                },
                {
                    "mark": {**refined, "color": COLOURS[1]},
                    "encoding": {"x": x, "y": y, "description": {"field": "text"}},
                },
                {"mark": label, "encoding": {"x": x, "y": y, "text": {"field": "trial"}}},
            ],
        },
    )


def _shapes(count: int) -> list[str]:
    return [SHAPES[place % len(SHAPES)] for place in range(count)]


def _x(title: str, scale: Spec) -> Spec:
    return {"field": "x", "type": "quantitative", "title": title, **scale}


def _y(title: str, rows: Sequence[Row], limits: Row) -> Spec:
    values = [
        v for row in rows for k, v in row.items() if k in ("y", "y_low", "y_high", "y_before")
    ]
    values = [value for value in (*values, *limits.values()) if value is not None]
    axis = {"axis": {"format": ".1~%"}} if title.endswith("(share)") else {}
    domain = {"domain": [min(0.0, *values), max(values)]} if values else {}
    return {"field": "y", "type": "quantitative", "title": title, "scale": domain, **axis}


def _error_bars(x: Spec, y: Spec) -> list[Spec]:
    """Layers with the interval of each row, along x and along y."""
    channels = {"x": x, "y": y}
    bars: list[Spec] = []
    for axis in channels:
        low = {axis: {**channels[axis], "field": f"{axis}_low"}}
        high = {f"{axis}2": {"field": f"{axis}_high"}}
        bars.append({"mark": QUIET_RULE, "encoding": {**channels, **low, **high}})
    return bars
