"""The results file: what was run, what was chosen, how it was judged. Written after every step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""model, tool, seed, facts of the run, choices by budget in minutes."""
Choice = dict[str, Any]
"""task.Choice with what the judge says (`judged`); without `front` where none was asked for."""


@dataclass
class Results:
    """Everything measured so far."""

    file: Path
    facts: dict[str, Any]
    """The machine and all that is equal for all runs."""
    models: dict[str, str] = field(default_factory=dict)
    """Name -> sha256 of its content."""
    runs: list[Run] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    """Name of a model -> noise floor of its KL, nats."""

    @classmethod
    def load(cls, file: Path) -> Results:
        """What a file holds.

        Raises:
            SystemExit: there is none.
        """
        if not file.exists():
            raise SystemExit(f"no results in {file}")
        content = json.loads(file.read_text(encoding="utf-8"))
        floors = content.get("floors", {})
        return cls(file, content["facts"], content["models"], content["runs"], floors)

    @classmethod
    def read(cls, file: Path, facts: dict[str, Any], models: dict[str, str]) -> Results:
        """Continue a file, or begin one.

        Raises:
            SystemExit: the file's runs were asked for something else.
        """
        asked = cls(file, facts, models)
        if not file.exists():
            return asked
        results = cls.load(file)
        results.check(asked)
        results.models |= models
        return results

    def check(self, other: Results) -> None:
        """Refuse runs of other conditions.

        Raises:
            SystemExit: they were asked for something else than these.
        """
        for name, value in other.facts["equal"].items():
            before = self.facts["equal"].get(name)
            if before != value:
                raise SystemExit(
                    f"{self.file} was measured with {name} = {before}, not {value}: "
                    "use another --out, or move it away"
                )
        for name, sha in other.models.items():
            if self.models.get(name, sha) != sha:
                raise SystemExit(
                    f"{self.file}: model {name} has other weights there: use another --out"
                )

    def merge(self, other: Results) -> None:
        """Take the runs of another file that are not here.

        Raises:
            SystemExit: they were asked for something else.
        """
        self.check(other)
        self.models |= other.models
        self.floors = {**other.floors, **self.floors}
        for run in other.runs:
            minutes = tuple(map(float, run["choices"]))
            if self.find(run["model"], run["tool"], run["seed"], minutes) is None:
                self.replace(run)

    def write(self) -> None:
        """Replace the file in one step."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(self.file.name + ".part")
        content = {"facts": self.facts, "models": self.models, "floors": self.floors}
        content["runs"] = self.runs
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.file)

    def find(
        self,
        model: str,
        tool: str,
        seed: int,
        minutes: tuple[float, ...],
        front: int | None = None,
    ) -> Run | None:
        """A run that was made for all these budgets, and with as large a front if one is asked for.

        Fronts of other sizes have other hypervolumes.
        """
        for run in self.runs:
            same = (run["model"], run["tool"], run["seed"]) == (model, tool, seed)
            as_large = front is None or run.get("front_asked", 0) == front
            if same and as_large and {f"{m:g}" for m in minutes} <= set(run["choices"]):
                return run
        return None

    def replace(self, run: Run) -> None:
        """Add a run in place of those that it covers."""
        self.runs = [
            other
            for other in self.runs
            if (other["model"], other["tool"], other["seed"])
            != (run["model"], run["tool"], run["seed"])
            or not set(other["choices"]) <= set(run["choices"])
        ]
        self.runs.append(run)
        self.write()

    def forget(self, tool: str) -> None:
        """Drop all runs of a tool."""
        self.runs = [run for run in self.runs if run["tool"] != tool]


def saved_points(run: Run) -> Iterator[dict[str, Any]]:
    """What a run has saved: the choice at each budget, and its front; parts of the run itself."""
    for choice in run["choices"].values():
        yield from (p for p in (choice, *choice.get("front", ())) if p["candidate"])


def is_judged(run: Run) -> bool:
    """Whether every candidate of a run was judged."""
    return all(point["judged"] for point in saved_points(run))


def judged_points(choice: Choice) -> list[tuple[float, dict[str, Any]]]:
    """Seconds and the judge's figures, of a choice and its front."""
    points = (choice, *choice.get("front", ()))
    return [(point["t_process"], point["judged"]) for point in points if point["judged"]]


def judged_choices(runs: list[Run]) -> Iterator[tuple[Run, float, Choice]]:
    """Each run's budgets in minutes with what was chosen, judged or without a candidate."""
    for run in runs:
        for minutes, choice in run["choices"].items():
            if choice["judged"] or not choice["candidate"]:
                yield run, float(minutes), choice
