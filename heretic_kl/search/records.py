"""A trial as plain data, and how Optuna's attributes hold it. Runs and draws nothing."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial

from heretic_kl.ablation import EditParameters, Refinement
from heretic_kl.errors import HereticKLError
from heretic_kl.scoring import Score, Stopped
from heretic_kl.search.sampler import ERROR, INTERRUPTED
from heretic_kl.search.space import SearchSpace

UNEDITED = -1
"""Stands for the unedited model where a trial's number would."""
SCORES = "scores"
SECONDS = "seconds"
STOPPED = "stopped"
TRACEBACK = "traceback"
REFINEMENT = "refinement"
"""Attributes of a trial."""
TRACEBACK_CHARACTERS = 6000

TrialState = Literal["complete", "stopped", "failed", "interrupted"]
"""`stopped`: measured until a finished trial surely beat it (racing)."""
Outcome = Mapping[str, Score] | Stopped


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
    """Of a trial that failed, in one line."""
    stopped: Stopped | None = None
    """What was measured of a trial that was stopped; it has no scores and no objectives."""
    traceback: str | None = None
    """Of a trial that failed, the middle left out where it is long."""


def read_record(trial: FrozenTrial, space: SearchSpace) -> TrialRecord:
    """The record of a trial that is over."""
    attributes = trial.user_attrs
    stopped = attributes.get(STOPPED)
    try:
        edit = space.edit(trial.params)
        if REFINEMENT in attributes:
            refinement = Refinement(**json.loads(attributes[REFINEMENT]))
            edit = replace(edit, refinement=refinement)
    except KeyError:
        edit = None  # interrupted before all parameters were drawn
    return TrialRecord(
        number=trial.number,
        state=_state(trial),
        parameters=dict(trial.params),
        edit=edit,
        scores=scores_from_json(attributes.get(SCORES, "{}")),
        objectives=tuple(trial.values or ()),
        seconds=float(attributes.get(SECONDS, 0.0)),
        error=attributes.get(ERROR),
        stopped=None if stopped is None else Stopped.from_dict(json.loads(stopped)),
        traceback=attributes.get(TRACEBACK),
    )


def refinement_attributes(refinement: Refinement) -> dict[str, str]:
    """What a trial keeps of what was learned."""
    return {REFINEMENT: json.dumps(asdict(refinement))}


def outcome_attributes(outcome: Outcome) -> dict[str, str]:
    """What a trial keeps of an outcome.

    Raises:
        TypeError: a score's details are not JSON-ready.
    """
    if isinstance(outcome, Stopped):
        return {STOPPED: json.dumps(outcome.to_dict())}
    return {SCORES: scores_to_json(outcome)}


def error_attributes(error: Exception) -> dict[str, str]:
    """What a trial keeps of an error: one line, and the traceback."""
    return {ERROR: one_line(error), TRACEBACK: _shortened_traceback(error)}


def one_line(error: Exception) -> str:
    """The first line of an error, with its class unless it is one that a user can mend."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, HereticKLError) else f"{type(error).__name__}: {text}"


def scores_to_json(scores: Mapping[str, Score]) -> str:
    """Scores by name, as text."""
    return json.dumps({name: score.to_dict() for name, score in scores.items()})


def scores_from_json(text: str) -> dict[str, Score]:
    """The inverse of `scores_to_json`."""
    return {name: Score.from_dict(data) for name, data in json.loads(text).items()}


def _shortened_traceback(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    if len(text) <= TRACEBACK_CHARACTERS:
        return text
    half = TRACEBACK_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _state(trial: FrozenTrial) -> TrialState:
    if trial.state == optuna.trial.TrialState.COMPLETE:
        return "complete"
    if trial.state == optuna.trial.TrialState.PRUNED:
        return "stopped"
    return "interrupted" if trial.user_attrs.get(ERROR) == INTERRUPTED else "failed"
