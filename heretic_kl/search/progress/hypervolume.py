"""How much of the space of objectives a front dominates. Knows nothing about Optuna or models."""

from __future__ import annotations

from collections.abc import Sequence

Point = tuple[float, ...]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Volume that is dominated by at least one point and bounded by the reference.

    Every objective is minimized. A point that is not below the reference everywhere adds nothing.
    Sliced along the last objective, dimension by dimension: for two or three objectives and some
    hundreds of points.
    """
    inside = [point for point in points if all(map(float.__lt__, point, reference))]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(inside)[0]
    inside.sort(key=lambda point: point[-1])
    ends = [*(point[-1] for point in inside[1:]), reference[-1]]
    volume = 0.0
    for count, (point, end) in enumerate(zip(inside, ends, strict=True), start=1):
        if end > point[-1]:
            slab = [other[:-1] for other in inside[:count]]
            volume += (end - point[-1]) * hypervolume(slab, reference[:-1])
    return volume


def hypervolume_history(points: Sequence[Point | None]) -> list[float]:
    """Share of the box between the best and the worst value of each objective, after every trial.

    None stands for a trial without objectives. Never falls; 0 everywhere where all are equal.
    """
    measured = [point for point in points if point is not None]
    if not measured:
        return [0.0] * len(points)
    columns = list(zip(*measured, strict=True))
    lows = [min(column) for column in columns]
    spans = [max(column) - low for column, low in zip(columns, lows, strict=True)]
    history: list[float] = []
    front: list[Point] = []
    volume = 0.0
    for point in points:
        if point is not None and all(span > 0 for span in spans):
            scaled = tuple((v - low) / s for v, low, s in zip(point, lows, spans, strict=True))
            front = [*(p for p in front if not all(map(float.__ge__, p, scaled))), scaled]
            volume = max(volume, hypervolume(front, (1.0,) * len(spans)))  # rounding
        history.append(volume)
    return history
