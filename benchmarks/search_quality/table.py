"""The comparison as a Markdown table, from the results file. Measures nothing.

python -m benchmarks.search_quality.table benchmarks/results/search_quality.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.search_quality.judge import mean_and_error, wilson
from benchmarks.search_quality.results import Run, judged_choices

TARGET = 0.05
"""Share of refusals, judged, at which KL is compared."""
TOOLS = {
    "heretic-kl": "heretic-kl",
    "heretic-kl-classic": "heretic-kl --no-refine",
    "heretic": "Heretic",
    "temaq": "Temaq",
}
"""Name in the results file -> name for people."""
PEERS = ("heretic", "temaq")


@dataclass(frozen=True)
class Point:
    """What a tool reaches on a model at a budget, over seeds."""

    model: str
    tool: str
    minutes: float
    seeds: int
    """Runs, those without a candidate included."""
    refusals: tuple[int, ...]
    """Of each judged run."""
    prompts: int
    """Harmful ones, in each run."""
    kl: float
    """Nats, mean over answered prompts, then seeds."""
    kl_error: float
    """Standard error over prompts, each averaged over seeds first."""
    kl_range: tuple[float, float]
    """Least and greatest over seeds."""
    notes: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Share of refusals over all seeds."""
        return sum(self.refusals) / (self.prompts * len(self.refusals))

    @property
    def interval(self) -> tuple[float, float]:
        """95% of the share over prompts; seeds see the same prompts and so do not narrow it."""
        return wilson(round(self.rate * self.prompts), self.prompts)

    @property
    def meets_target(self) -> bool:
        """Whether every seed has a candidate and their mean share is at most the target."""
        return len(self.refusals) == self.seeds and self.rate <= TARGET


Key = tuple[str, float, str]
"""Model, budget in minutes, tool."""


def points(runs: Sequence[Run]) -> list[Point]:
    """One a model, budget and tool that has a judged candidate, in this order."""
    made = (_point(*key, choices) for key, choices in _groups(runs).items())
    return [point for point in made if point is not None]


def _groups(runs: Sequence[Run]) -> dict[Key, list[dict[str, Any]]]:
    """What was chosen, by model, budget and tool in the table's order."""
    groups: dict[Key, list[dict[str, Any]]] = {}
    for run, minutes, choice in judged_choices(list(runs)):
        groups.setdefault((run["model"], minutes, run["tool"]), []).append(choice)
    order = {tool: place for place, tool in enumerate(TOOLS)}
    return dict(sorted(groups.items(), key=lambda item: (*item[0][:2], order.get(item[0][2], 99))))


def _point(model: str, minutes: float, tool: str, choices: list[dict[str, Any]]) -> Point | None:
    judged = [choice["judged"] for choice in choices if choice["judged"]]
    if not judged:
        return None
    per_prompt = [
        sum(j["kl_per_prompt"][prompt] for j in judged) / len(judged)
        for prompt in judged[0]["kl_per_prompt"]
    ]
    kl = mean_and_error(per_prompt)
    assert kl is not None  # the reference answers some harmless prompt
    means = [j["kl"]["mean"] for j in judged]
    harmful = [j["candidate"]["harmful"] for j in judged]
    return Point(
        model=model,
        tool=tool,
        minutes=minutes,
        seeds=len(choices),
        refusals=tuple(h["refusals"] for h in harmful),
        prompts=harmful[0]["n"],
        kl=float(kl["mean"] or 0.0),
        kl_error=float(kl["se"] or 0.0),
        kl_range=(min(means), max(means)),
        notes=tuple(sorted({choice["note"] for choice in choices if choice["note"]})),
    )


def best_peer(of: Point, among: Sequence[Point]) -> Point | None:
    """The peer with the least KL that meets the target on the same model at the same budget."""
    same = [p for p in among if (p.model, p.minutes) == (of.model, of.minutes)]
    return min(
        (p for p in same if p.tool in PEERS and p.meets_target), key=lambda p: p.kl, default=None
    )


def markdown(runs: Sequence[Run]) -> str:
    """The table, and below it what was not as usual."""
    all_points = points(runs)
    head = ["model", "minutes", "tool", "refusals by seed", "KL, answered prompts (nats)"]
    head += ["range over seeds", "KL / best peer's at <= 5% refusals"]
    lines = [_row(head), _row(["---"] * len(head))]
    for key, choices in _groups(runs).items():
        point = _point(*key, choices)
        lines.append(_row(_cells(point, all_points) if point else _no_candidate(*key, choices)))
    notes = list(_notes(runs))
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _no_candidate(model: str, minutes: float, tool: str, choices: list[Any]) -> list[str]:
    """The row of a tool that reached nothing within a budget."""
    runs = f"{len(choices)} run{'s' if len(choices) > 1 else ''} without a candidate"
    return [model, f"{minutes:g}", TOOLS.get(tool, tool), runs, "", "", ""]


def _cells(point: Point, among: Sequence[Point]) -> list[str]:
    refusals = ", ".join(map(str, point.refusals)) + f" of {point.prompts}"
    if len(point.refusals) < point.seeds:
        refusals += f" ({point.seeds - len(point.refusals)} without a candidate)"
    peer = best_peer(point, among)
    if point.tool in PEERS or peer is None:
        ratio = "" if point.tool in PEERS else "no peer at the target"
    else:
        ratio = f"{point.kl / peer.kl:.2f}" if point.meets_target else "over the target"
    low, high = point.kl_range
    kl = f"{point.kl:.4f} +- {point.kl_error:.4f}"
    name = TOOLS.get(point.tool, point.tool)
    return [
        point.model,
        f"{point.minutes:g}",
        name,
        refusals,
        kl,
        f"{low:.4f} to {high:.4f}",
        ratio,
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _notes(runs: Sequence[Run]) -> Iterator[str]:
    for run, minutes, choice in judged_choices(list(runs)):
        if choice["note"]:
            name = TOOLS.get(run["tool"], run["tool"])
            place = f"{run['model']}, {name}, seed {run['seed']}, {minutes:g} minutes"
            yield f"- {place}: {choice['note']}"


def main() -> None:
    """Print the table of a results file."""
    parser = argparse.ArgumentParser(description="Print the comparison as a Markdown table.")
    parser.add_argument("results", type=Path)
    content = json.loads(parser.parse_args().results.read_text(encoding="utf-8"))
    print(markdown(content["runs"]))


if __name__ == "__main__":
    main()
