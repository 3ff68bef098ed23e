"""A finished trial as plain data, apart from Optuna. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from heretic_kl.ablation import EditParameters
from heretic_kl.scoring import Score, Stopped

UNEDITED = -1
"""Stands for the unedited model where a trial's number would."""

TrialState = Literal["complete", "stopped", "failed", "interrupted"]
"""`stopped`: measured until a finished trial surely beat it (racing)."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial: what was tried, what came of it."""

    number: int
    state: TrialState
    parameters: Mapping[str, Any]
    """As the search space names them."""
    edit: EditParameters | None
    """None for a trial that was interrupted before its parameters were drawn."""
    scores: Mapping[str, Score] = field(default_factory=dict)
    """On the validation prompts, by scorer, in the order of the config."""
    objectives: tuple[float, ...] = ()
    """What the optimizer saw, in the order of the objectives; smaller is better for all."""
    seconds: float = 0.0
    error: str | None = None
    stopped: Stopped | None = None
    """What was measured of a trial that was stopped; it has no scores and no objectives."""
