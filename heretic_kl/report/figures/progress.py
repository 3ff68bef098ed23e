"""How the search went. Draws nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from heretic_kl.report.drawing import COLOURS
from heretic_kl.report.figures.figure import (
    LINKED,
    WIDTH,
    Figure,
    Row,
    panels,
    plain_y,
    points,
    whole,
)

KINDS: Final = ("searched", "predicted", "refined")


def history_figure(rows: Sequence[Row]) -> Figure:
    """Objectives in the order of trials, and the best so far."""
    scores = list(dict.fromkeys(row["score"] for row in rows))
    last = {row["score"]: row for row in rows}
    x = whole("trial", [row["trial"] for row in rows])
    present = {row["kind"] for row in rows}
    kinds = {kind: COLOURS[1 if kind == "refined" else 5] for kind in KINDS if kind in present}
    shapes = ["diamond" if kind == "refined" else "circle" for kind in kinds]
    higher = list(dict.fromkeys(row["score"] for row in rows if row["role"] == "maximize"))
    return Figure(
        name="history",
        title="Search history",
        caption="Every complete trial's objectives on the validation prompts, and the best "
        "measured so far (line)."
        + f" Higher is better for {' and '.join(higher)}."
        * bool(higher)
        + " Screened trials stand beside them: hollow marks are what is predicted, as these trials "
        "generated no responses; it is never the best so far." * ("predicted" in present),
        summary=" ".join(
            f"Best {score}: {row['best']:.4g} after trial {row['trial']}."
            for score, row in last.items()
            if row["best"] is not None
        ),
        columns={"trial": "trial", "kind": "kind", "score": "score", "value": "value"}
        | {"best": "best so far"},
        rows=rows,
        spec=panels(
            "score",
            scores,
            [
                {
                    "mark": {"type": "line", "interpolate": "step-after", "color": COLOURS[0]}
                    | {"aria": False, "strokeWidth": 1.5},
                    "encoding": {"x": x, "y": plain_y("best")},
                },
                {
                    "mark": {"type": "point", "size": 36, "strokeWidth": 1},
                    "encoding": {
                        "x": x,
                        "y": plain_y("value"),
                        **points("kind", kinds, shapes, {"predicted"}),
                        **LINKED,
                    },
                },
            ],
            height=150,
        ),
    )


def hypervolume_figure(rows: Sequence[Row]) -> Figure:
    """What the front dominates, over the time that trials took."""
    refined = any(row["kind"] == "refined" for row in rows)
    searched = [row for row in rows if row["kind"] == "searched"]
    after_search = f" The search alone reached {searched[-1]['hypervolume']:.3f}." * bool(
        refined and searched
    )
    return Figure(
        name="hypervolume",
        title="Hypervolume over time",
        caption="Share of the box between the best and the worst value of every objective that "
        "the front dominates; 1 would be a trial that is best in all of them. Time is what trials "
        "took, loading and calibration left out.",
        summary=f"{rows[-1]['hypervolume']:.3f} after {len(rows)} trials and "
        f"{rows[-1]['minutes']:.1f} minutes.{after_search}",
        columns={"trial": "trial", "kind": "kind", "minutes": "minutes"}
        | {"hypervolume": "hypervolume"},
        rows=rows,
        spec={
            "width": WIDTH,
            "height": 180,
            "mark": {"type": "line", "interpolate": "step-after", "color": COLOURS[0]}
            | {"point": {"size": 18}},
            "encoding": {
                "x": {"field": "minutes", "type": "quantitative", "title": "minutes of trials"}
                | {"scale": {"zero": True}},
                "y": {"field": "hypervolume", "type": "quantitative"}
                | {"scale": {"domain": [0, 1]}, "title": "hypervolume"},
            },
        },
    )


def importance_figure(rows: Sequence[Row]) -> Figure:
    """Which parameters decide each objective."""
    scores = list(dict.fromkeys(row["score"] for row in rows))
    top = {score: next(row for row in rows if row["score"] == score) for score in scores}
    return Figure(
        name="importance",
        title="Parameter importance",
        caption="Optuna's estimate (PED-ANOVA) of which parameters separate the best trials from "
        "the others, for each objective; shares add up to 1. Refined trials are left out.",
        summary=" ".join(
            f"{score}: {row['parameter']} matters most ({row['share']:.0%})."
            for score, row in top.items()
        ),
        columns={"score": "objective", "parameter": "parameter", "share": "share"},
        rows=rows,
        spec=panels(
            "score",
            scores,
            [
                {
                    "mark": {"type": "bar", "color": COLOURS[0]},
                    "encoding": {
                        "y": {"field": "parameter", "type": "nominal", "sort": None}
                        | {"title": None, "axis": {"labelLimit": 180}},
                        "x": {"field": "share", "type": "quantitative", "title": "share"}
                        | {"axis": {"format": ".0%"}},
                    },
                }
            ],
            height={"step": 15},
            shared_y=True,
        ),
    )
