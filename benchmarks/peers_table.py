"""What `peers.py` found, as plain text: `python benchmarks/peers_table.py FILE.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """All parts that are there."""
    lines = [f"{result['model']}, {result['date']}, {result['machine']['processor']}"]
    if "teacher_forced" in result:
        lines += ["", "Teacher-forced trials", *_aligned(list(_forced(result["teacher_forced"])))]
        lines += _computed(result["teacher_forced"])
        lines += _fronts(result["teacher_forced"]["our_searches"])
    if "generation" in result:
        lines += ["", "Trials that generate", *_aligned(list(_generated(result["generation"])))]
        lines += _fronts(result["generation"]["our_searches"])
    return "\n".join(lines)


Row = Sequence[str]


def _forced(part: dict[str, Any]) -> Iterator[Row]:
    peer = part["temaq"]
    yield "", "median s", "trials/min", "Temaq's median over it"
    yield "Temaq", f"{peer['median_seconds']:.2f}", f"{peer['trials_per_minute']:.1f}", ""
    for name, seconds in part["ours"]["median_seconds"].items():
        ratio = peer["median_seconds"] / seconds
        yield f"ours, {name}", f"{seconds:.2f}", f"{60 / seconds:.1f}", f"{ratio:.2f}"
    yield from _searches(part["our_searches"], peer["median_seconds"])


def _generated(part: dict[str, Any]) -> Iterator[Row]:
    peer = part["heretic"]
    yield "", "median s", "trials/min", "Heretic's median over it, over the mean"
    yield "Heretic", f"{peer['median_seconds']:.2f}", f"{peer['trials_per_minute']:.1f}", ""
    for name, run in (("1", part["ours"]), ("4", part["ours_4_at_once"])):
        median, mean = run["median_seconds"], run["mean_seconds"]
        ratios = f"{peer['median_seconds'] / median:.2f}, {peer['median_seconds'] / mean:.2f}"
        same = f"{run['trials_with_verdicts_of_plain_generation']}/{run['trials']} as plain"
        rate = f"{run['trials_per_minute']:.1f}"
        yield f"ours, {name} at once ({same})", f"{median:.2f}", rate, ratios
    yield from _searches(part["our_searches"], peer["median_seconds"])


def _searches(searches: dict[str, Any], peer: float) -> Iterator[Row]:
    for name, found in searches.items():
        seconds = found["median_seconds"]
        stopped = f" ({found['stopped']}/{found['trials']} stopped)" if found["stopped"] else ""
        label = f"our search, {name}{stopped}"
        yield label, f"{seconds:.2f}", f"{found['trials_per_minute']:.1f}", f"{peer / seconds:.2f}"


def _computed(part: dict[str, Any]) -> Iterator[str]:
    sides = [("Temaq", c) for c in part["temaq"]["computed_by_trial"]]
    sides.append(("ours, all layers", part["ours"]["computed_by_trial_of_all_layers"]))
    for name, found in sides:
        yield (
            f"{name}: from layer {found['lowest_layer']}, {found['layers_per_pass']:.1f} layers a "
            f"pass, {found['passes']} passes, {found['token_positions']:,} positions a trial"
        )


def _fronts(searches: dict[str, Any]) -> Iterator[str]:
    for name, found in searches.items():
        points = ", ".join(
            f"#{trial['number']} ({', '.join(f'{value:.3g}' for value in trial['objectives'])})"
            for trial in found["front"]
        )
        yield f"front, {name}: {points}"


def _aligned(rows: list[Row]) -> Iterator[str]:
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for label, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([label.ljust(first), *padded])


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
