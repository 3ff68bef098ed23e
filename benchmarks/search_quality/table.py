"""The comparison as a Markdown table, from the results file. Measures nothing.

python -m benchmarks.search_quality.table benchmarks/results/search_quality.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.search_quality.figures import mean_and_error, wilson
from benchmarks.search_quality.results import Choice, Run, judged_choices, judged_points
from benchmarks.search_quality.validation import HEAD, cells, held
from benchmarks.search_quality.volume import DEFAULT_FLOOR, volume

TARGET = 0.05
"""Share of refusals, judged, at which KL is compared."""
TOOLS = {
    "heretic-kl": "heretic-kl",
    "heretic-kl-classic": "heretic-kl --no-refine",
    "heretic": "Heretic",
    "temaq": "Temaq",
    "abliterix": "Abliterix",
    "senbonzakura": "Senbonzakura",
}
"""Name in the results file -> name for people."""
PEERS = ("heretic", "temaq", "abliterix", "senbonzakura")


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
    volumes: tuple[float, ...]
    """Hypervolume of each run whose front was judged."""
    front: tuple[int, ...]
    """Judged points of each of them, the choice included."""

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


Floors = Mapping[str, float]
"""Model -> noise floor of its KL, nats."""


def points(runs: Sequence[Run], floors: Floors) -> list[Point]:
    """One a model, budget and tool that has a judged candidate, in this order."""
    made = (_point(*key, choices, floors) for key, choices in _groups(runs).items())
    return [point for point in made if point is not None]


def _groups(runs: Sequence[Run]) -> dict[Key, list[Choice]]:
    """What was chosen, by model, budget and tool in the table's order."""
    groups: dict[Key, list[Choice]] = {}
    for run, minutes, choice in judged_choices(list(runs)):
        groups.setdefault((run["model"], minutes, run["tool"]), []).append(choice)
    order = {tool: place for place, tool in enumerate(TOOLS)}
    return dict(sorted(groups.items(), key=lambda item: (*item[0][:2], order.get(item[0][2], 99))))


def _point(
    model: str, minutes: float, tool: str, choices: list[Choice], floors: Floors
) -> Point | None:
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
    fronts = [choice for choice in choices if "front" in choice]
    volumes = (volume(choice, floors.get(model, DEFAULT_FLOOR)) for choice in fronts)
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
        volumes=tuple(value for value in volumes if value is not None),
        front=tuple(len(judged_points(choice)) for choice in fronts),
    )


def best_peer(of: Point, among: Sequence[Point]) -> Point | None:
    """The peer with the least KL that meets the target on the same model at the same budget.

    Where none meets it: the one with the fewest refusals, of those with the least KL.
    """
    same = [p for p in among if (p.model, p.minutes) == (of.model, of.minutes)]
    peers = [p for p in same if p.tool in PEERS]
    met = [p for p in peers if p.meets_target]
    if met:
        return min(met, key=lambda p: p.kl)
    return min(peers, key=lambda p: (p.rate, p.kl), default=None)


def markdown(runs: Sequence[Run], floors: Floors) -> str:
    """The comparison, how validation figures hold, and what was not as usual."""
    parts = [_comparison(runs, floors), _validation(runs)]
    lists = _fronts(runs, floors), _volumes(runs, floors), _notes(runs)
    parts += ["\n".join(lines) for lines in lists if lines]
    return "\n\n".join(parts)


def _comparison(runs: Sequence[Run], floors: Floors) -> str:
    all_points = points(runs, floors)
    head = ["model", "minutes", "tool", "refusals by seed", "KL, answered prompts (nats)"]
    head += ["range over seeds", "judged points", "hypervolume", "KL / best peer's"]
    lines = [_row(head), _row(["---"] * len(head))]
    for key, choices in _groups(runs).items():
        point = _point(*key, choices, floors)
        lines.append(_row(_cells(point, all_points) if point else _no_candidate(*key, choices)))
    return "\n".join(lines)


def _no_candidate(model: str, minutes: float, tool: str, choices: list[Choice]) -> list[str]:
    """The row of a tool that reached nothing within a budget."""
    runs = f"{len(choices)} run{'s' if len(choices) > 1 else ''} without a candidate"
    return [model, f"{minutes:g}", TOOLS.get(tool, tool), runs, *[""] * 5]


def _cells(point: Point, among: Sequence[Point]) -> list[str]:
    refusals = ", ".join(map(str, point.refusals)) + f" of {point.prompts}"
    if len(point.refusals) < point.seeds:
        refusals += f" ({point.seeds - len(point.refusals)} without a candidate)"
    low, high = point.kl_range
    return [
        point.model,
        f"{point.minutes:g}",
        TOOLS.get(point.tool, point.tool),
        refusals,
        f"{point.kl:.4f} +- {point.kl_error:.4f}",
        f"{low:.4f} to {high:.4f}",
        ", ".join(map(str, point.front)),
        _volume(point.volumes),
        _ratio(point, among),
    ]


def _volume(volumes: Sequence[float]) -> str:
    """Median and range over seeds."""
    if len(volumes) < 2:
        return "".join(f"{value:.3f}" for value in volumes)
    return f"{median(volumes):.3f} ({min(volumes):.3f} to {max(volumes):.3f})"


def _ratio(point: Point, among: Sequence[Point]) -> str:
    """KL over the best peer's, where both meet the target; otherwise over what it says."""
    if point.tool in PEERS:
        return ""
    if not point.meets_target:
        return "over the target"
    peer = best_peer(point, among)
    if peer is None:
        return "no peer"
    ratio = f"{point.kl / peer.kl:.2f}" if peer.kl else "peer at 0"
    name = TOOLS.get(peer.tool, peer.tool)
    if peer.meets_target:
        return f"{ratio} ({name})"
    return f"no peer at the target; {ratio} of {name}'s at {100 * peer.rate:.0f}% refusals"


def _fronts(runs: Sequence[Run], floors: Floors) -> list[str]:
    """What peers' judged fronts hold at the target, where no peer picked that, beside our picks.

    Such a point is chosen by what the judge said of it, which favours the peer.
    """
    groups, all_points, lines = _groups(runs), points(runs, floors), []
    for ours in (point for point in all_points if point.tool not in PEERS and point.meets_target):
        peer = best_peer(ours, all_points)
        if peer is None or peer.meets_target:
            continue
        where = f"- {ours.model}, {ours.minutes:g} minutes, {TOOLS[ours.tool]}"
        met = [
            (judged["kl"]["mean"], judged["candidate"]["harmful"]["refusals"], TOOLS[tool])
            for (model, minutes, tool), choices in groups.items()
            if (model, minutes) == (ours.model, ours.minutes) and tool in PEERS
            for choice in choices
            for _, judged in judged_points(choice)
            if judged["candidate"]["harmful"]["refusals"] <= TARGET * ours.prompts
        ]
        if met:
            kl, refusals, tool = min(met)
            lines.append(f"{where}: {ours.kl / kl:.2f} of {tool}'s unpicked {refusals} at {kl:.4f}")
        else:
            lines.append(f"{where}: no judged point of a peer's front meets the target")
    return lines


def _validation(runs: Sequence[Run]) -> str:
    head = ["model", "minutes", "tool", *HEAD]
    lines = [_row(head), _row(["---"] * len(head))]
    for (model, minutes, tool), choices in _groups(runs).items():
        said = cells(held(choices))
        if any(said):
            lines.append(_row([model, f"{minutes:g}", TOOLS.get(tool, tool), *said]))
    return "\n".join(lines)


def _volumes(runs: Sequence[Run], floors: Floors) -> list[str]:
    """In how many runs the hypervolume is above every peer's of the same seed and budget.

    Fronts of as many judged points are compared.
    """
    values: dict[tuple[str, float, int, int], dict[str, float]] = {}
    for run, minutes, choice in judged_choices(list(runs)):
        value = volume(choice, floors.get(run["model"], DEFAULT_FLOOR))
        if value is not None:
            key = (run["model"], minutes, run["seed"], run.get("front_asked", 0))
            values.setdefault(key, {})[run["tool"]] = value
    lines = []
    for tool in (tool for tool in TOOLS if tool not in PEERS):
        beside = [
            (of_run[tool], max(v for name, v in of_run.items() if name in PEERS))
            for of_run in values.values()
            if tool in of_run and any(name in PEERS for name in of_run)
        ]
        above = sum(value > peer for value, peer in beside)
        if beside:
            name = TOOLS[tool]
            lines.append(
                f"- {name}: hypervolume above every peer's in {above} of {len(beside)} runs"
            )
    models = sorted({model for model, *_ in values})
    shown = [f"{model} {floors.get(model, DEFAULT_FLOOR):.4f}" for model in models]
    return [*lines, f"- noise floor of the KL (nats): {', '.join(shown)}"] if shown else []


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _notes(runs: Sequence[Run]) -> list[str]:
    return [
        f"- {run['model']}, {TOOLS.get(run['tool'], run['tool'])}, seed {run['seed']}, "
        f"{minutes:g} minutes: {note}"
        for run, minutes, choice in judged_choices(list(runs))
        for note in (choice["note"], choice.get("front_note"))
        if note
    ]


def write_between_markers(page: Path, name: str, text: str) -> None:
    """Replace what a page holds between `<!-- NAME -->` and `<!-- end of NAME -->`.

    Raises:
        SystemExit: it has no such markers.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, opened, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (opened and closed):
        raise SystemExit(f"{page}: no lines {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")


def main() -> None:
    """Print the tables of a results file."""
    parser = argparse.ArgumentParser(description="Print the comparison as Markdown tables.")
    parser.add_argument("results", type=Path)
    content = json.loads(parser.parse_args().results.read_text(encoding="utf-8"))
    print(markdown(content["runs"], content.get("floors", {})))


if __name__ == "__main__":
    main()
