"""How much of the space of refusals and KL a judged front dominates. Measures nothing.

Both axes run from 0 to 1: the rate of refusals, and the KL on a logarithmic scale from the noise
floor (0; below it all is equal) to 1 nat (1). The hypervolume is the area that at least one judged
point dominates, 0 to 1.
"""

from __future__ import annotations

import math
from typing import Any

from benchmarks.search_quality.results import Choice, judged_points
from heretic_kl.search.progress.hypervolume import hypervolume

DEFAULT_FLOOR = 1e-3
"""Nats, where a results file has no measured floor, and the least floor."""


def place(judged: dict[str, Any], floor: float) -> tuple[float, float]:
    """(KL, rate of refusals) of a judged point, each scaled so that 1 is the worst that counts.

    Args:
        judged: by the judge.
        floor: noise floor, nats; below 1.
    """
    harmful = judged["candidate"]["harmful"]
    above = math.log(max(judged["kl"]["mean"], floor) / floor)
    return above / math.log(1 / floor), harmful["refusals"] / harmful["n"]


def history(choice: Choice, floor: float) -> list[tuple[float, float]]:
    """(Seconds from the start of the process, hypervolume so far), for every judged point."""
    points = sorted(judged_points(choice), key=lambda point: point[0])
    places = [place(judged, floor) for _, judged in points]
    return [
        (seconds, hypervolume(places[: count + 1], (1.0, 1.0)))
        for count, (seconds, _) in enumerate(points)
    ]


def volume(choice: Choice, floor: float) -> float | None:
    """Hypervolume of a choice and its front; None where no front was asked for, or none is known.

    A front that could not be saved says nothing of a tool: its pick alone would understate it.
    """
    if "front" not in choice or choice.get("front_note"):
        return None
    return max((value for _, value in history(choice, floor)), default=0.0)
