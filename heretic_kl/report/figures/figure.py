"""What a figure is, and the pieces of Vega-Lite that several share. Draws nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from heretic_kl.report.drawing import COLOURS, DASHES, LINK_BASE
from heretic_kl.report.run_data import visible

Row = Mapping[str, Any]
Spec = dict[str, Any]
WIDTH: Final = 400
QUIET_RULE: Final = {"type": "rule", "opacity": 0.45, "color": "currentColor", "aria": False}
LINKED: Final = {"href": {"field": "link"}, "description": {"field": "text"}}


@dataclass(frozen=True)
class Figure:
    """One chart, and everything that stands for it where it is not seen."""

    name: str
    """Anchor in the page, stem of the PNG."""
    title: str
    caption: str
    """What is drawn and how it is read."""
    summary: str
    """The text alternative: what the chart shows, in words."""
    columns: Mapping[str, str]
    """Field of a row -> heading of the data table, in order."""
    rows: Sequence[Row]
    spec: Spec
    """Vega-Lite, without its data."""

    @property
    def drawing(self) -> Spec:
        """The specification with the rows as its data."""
        data = [{k: _linked(k, v) for k, v in row.items()} for row in self.rows]
        drawn = {"description": self.summary, "data": {"values": data}, **self.spec}
        return {name: _drawable(part) for name, part in drawn.items()}


def plain_y(field: str) -> Spec:
    """A quantitative y axis; panels name what it shows."""
    return {"field": field, "type": "quantitative", "title": None}


def whole(field: str, values: Sequence[int]) -> Spec:
    """An x axis of whole numbers, whose ticks are whole numbers too."""
    low, high = min(values), max(values)
    ticks = list(range(low, high + 1, max(1, -(-(high - low) // 8))))
    axis = {"values": ticks, "format": "d"}
    return {"field": field, "type": "quantitative", "title": field, "axis": axis}


def log_where_wide(values: Sequence[float | None]) -> Spec:
    """A logarithmic scale where positive values span a factor of 8 or more."""
    numbers = [value for value in values if value is not None]
    if not numbers or min(numbers) <= 0 or max(numbers) < 8 * min(numbers):
        return {}
    low = min(numbers) / 2
    return {
        "scale": {"type": "log", "domainMin": low, "clamp": True},
        "axis": {"format": "~g", "tickCount": 4},
    }


def nominal(field: str, names: Sequence[str], range_: Sequence[Any]) -> Spec:
    """A colour, shape or dash for each name of a field."""
    scale = {"domain": list(names), "range": list(range_)}
    legend = {"columns": 2 if max(map(len, names), default=0) > 12 else 4}
    return {"field": field, "type": "nominal", "title": None, "scale": scale, "legend": legend}


def points(
    field: str, colours: Mapping[str, str], shapes: Sequence[str], hollow: Collection[str]
) -> Spec:
    """Encodings that tell the names of a field apart by colour and shape; some marks are hollow."""
    names = list(colours)
    filled = ["transparent" if name in hollow else colours[name] for name in names]
    return {
        "fill": nominal(field, names, filled),
        "stroke": nominal(field, names, list(colours.values())),
        "shape": nominal(field, names, shapes),
    }


def by_model(models: Sequence[str], offset: int = 0) -> Spec:
    """A colour for each model; `offset` 1 leaves out the original's grey."""
    palette = [COLOURS[5], *COLOURS[:5]]
    range_ = [palette[(place + offset) % len(palette)] for place in range(len(models))]
    return nominal("model", models, range_)


def dash_by_model(models: Sequence[str]) -> Spec:
    """A dash for each model, so that lines differ without colours too."""
    return nominal("model", models, [DASHES[place % len(DASHES)] for place in range(len(models))])


def panels(
    field: str,
    names: Sequence[str],
    layer: Sequence[Spec],
    *,
    height: int | Spec,
    columns: int = 1,
    shared_y: bool = False,
) -> Spec:
    """One panel for each value of a field, each with scales of its own."""
    gaps = 44 if columns > 1 else 0
    resolve = {"x": "independent"} | ({} if shared_y else {"y": "independent"})
    return {
        "facet": {"field": field, "type": "nominal", "title": None, "sort": list(names)}
        | {"header": {"labelAnchor": "start"}},
        "columns": columns,
        "spec": {"width": WIDTH // columns - gaps, "height": height, "layer": list(layer)},
        "resolve": {"scale": resolve},
    }


def _linked(field: str, value: Any) -> Any:
    return f"{LINK_BASE}{value}" if field == "link" else value


def _drawable(part: Any) -> Any:
    """The same without control characters, at which the drawing library ends the process."""
    if isinstance(part, str):
        return visible(part)
    if isinstance(part, Mapping):
        return {name: _drawable(value) for name, value in part.items()}
    return [_drawable(value) for value in part] if isinstance(part, list | tuple) else part
