"""The results file: what was run, what was chosen, how it was judged. Written after every step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""model, tool, seed, minutes (its budgets), facts of the run, choices by budget."""


@dataclass
class Results:
    """Everything measured so far."""

    file: Path
    facts: dict[str, Any]
    """The machine and all that is equal for all runs."""
    models: dict[str, str] = field(default_factory=dict)
    """Name -> sha256 of its content."""
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path, facts: dict[str, Any], models: dict[str, str]) -> Results:
        """Continue a file, or begin one.

        Raises:
            SystemExit: the file's runs were asked for something else.
        """
        if not file.exists():
            return cls(file, facts, models)
        content = json.loads(file.read_text(encoding="utf-8"))
        for name, value in facts["equal"].items():
            before = content["facts"]["equal"].get(name)
            if before != value:
                raise SystemExit(
                    f"{file} was measured with {name} = {before}, not {value}: "
                    "use another --out, or move it away"
                )
        for name, sha in models.items():
            if content["models"].get(name, sha) != sha:
                raise SystemExit(f"{file}: model {name} has other weights there: use another --out")
        return cls(file, content["facts"], {**content["models"], **models}, content["runs"])

    def write(self) -> None:
        """Replace the file in one step."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_name(self.file.name + ".part")
        content = {"facts": self.facts, "models": self.models, "runs": self.runs}
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.file)

    def find(self, model: str, tool: str, seed: int, minutes: tuple[float, ...]) -> Run | None:
        """A run that was made for all these budgets."""
        for run in self.runs:
            same = (run["model"], run["tool"], run["seed"]) == (model, tool, seed)
            if same and {f"{m:g}" for m in minutes} <= set(run["choices"]):
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


def is_judged(run: Run) -> bool:
    """Whether every candidate of a run was judged."""
    return all(choice["judged"] or not choice["candidate"] for choice in run["choices"].values())


def judged_choices(runs: list[Run]) -> Iterator[tuple[Run, float, dict[str, Any]]]:
    """Each run's budgets in minutes with what was chosen, judged or without a candidate."""
    for run in runs:
        for minutes, choice in run["choices"].items():
            if choice["judged"] or not choice["candidate"]:
                yield run, float(minutes), choice
