"""A trial as plain data, and how Optuna's attributes hold it. Runs and draws nothing."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial

from heretic_kl.ablation import EditParameters, Refinement
from heretic_kl.errors import HereticKLError
from heretic_kl.files import redacted
from heretic_kl.scoring import Score, ScorerSpec, Stopped
from heretic_kl.search.sampler import ERROR, INTERRUPTED, REFINEMENT, STOPPED
from heretic_kl.search.screening import Screened
from heretic_kl.search.space import SearchSpace
from heretic_kl.search.storage.pieces import whole

UNEDITED = -1
"""Stands for the unedited model where a trial's number would."""
SCORES = "scores"
SECONDS = "seconds"
TRACEBACK = "traceback"
PREDICTED = "predicted"
OBJECTIVES = "objectives"
"""Attributes of a trial."""
TRACEBACK_CHARACTERS = 6000

TrialState = Literal["complete", "screened", "stopped", "failed", "interrupted"]
"""`screened`: no responses were generated, as rung 1 found nothing promising. `stopped`: measured
until a finished trial surely beat it (racing)."""
Outcome = Mapping[str, Score] | Screened | Stopped


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
    """In the order of the objectives; smaller is better for all. The optimizer saw these, or in a
    search with two rungs what rung 1 predicts in their place."""
    seconds: float = 0.0
    error: str | None = None
    """Of a trial that failed, in one line."""
    stopped: Stopped | None = None
    """What was measured of a trial that was stopped; it has no scores and no objectives."""
    traceback: str | None = None
    """Of a trial that failed, the middle left out where it is long."""
    predicted: Mapping[str, float] = field(default_factory=dict)
    """What rung 1 said of objectives that need responses, by scorer; empty without rungs."""

    @property
    def refinement(self) -> Refinement | None:
        """What was learned; None: nothing was."""
        return None if self.edit is None else self.edit.refinement


def read_record(trial: FrozenTrial, space: SearchSpace) -> TrialRecord:
    """The record of a trial that is over."""
    attributes = {name: whole(trial.user_attrs, name) for name in trial.user_attrs}
    stopped = attributes.get(STOPPED)
    try:
        edit = space.edit(trial.params)
        if REFINEMENT in attributes:
            refinement = Refinement.from_dict(json.loads(attributes[REFINEMENT]))
            edit = replace(edit, refinement=refinement)
    except KeyError:
        edit = None  # interrupted before all parameters were drawn
    return TrialRecord(
        number=trial.number,
        state=_state(trial),
        parameters=dict(trial.params),
        edit=edit,
        scores=scores_from_json(attributes.get(SCORES, "{}")),
        objectives=_objectives(trial),
        predicted=json.loads(attributes.get(PREDICTED, "{}")),
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
    if isinstance(outcome, Screened):
        predicted = json.dumps(dict(outcome.predicted))
        scores = outcome.scores
        if not outcome.promoted:  # it is on no front: nobody compares it
            scores = {name: score.without_prompts() for name, score in scores.items()}
        return {SCORES: scores_to_json(scores), PREDICTED: predicted}
    return {SCORES: scores_to_json(outcome)}


class Outcomes:
    """Reads outcomes by a study's objectives.

    Args:
        objectives: the scorers that steer it, in order.
        limits: largest acceptable score by scorer.
    """

    def __init__(self, objectives: Sequence[ScorerSpec], limits: Mapping[str, float]) -> None:
        self._objectives = tuple(objectives)
        self._limits = dict(limits)

    def attributes(self, outcome: Outcome) -> dict[str, str]:
        """What a trial keeps; raises what storing the outcome would raise."""
        attributes = outcome_attributes(outcome)
        if isinstance(outcome, Stopped):
            return attributes
        self.values(outcome)
        if isinstance(outcome, Screened) and outcome.promoted:
            attributes[OBJECTIVES] = json.dumps(self.values(outcome.scores))
        return attributes

    def values(self, outcome: Mapping[str, Score] | Screened) -> list[float]:
        """The objectives, smaller is better; of all trials of a study what the same rung says."""
        scores, predicted = _rungs(outcome)
        values = []
        for spec in self._objectives:
            value = predicted.get(spec.name)
            if value is None:
                value = scores[spec.name].optimized
            assert value is not None  # the suite refuses objectives without a value
            values.append(-value if spec.role == "maximize" else value)
        return values

    def excesses(self, outcome: Outcome) -> dict[str, float]:
        """By how much scores exceed their limits, at best; at most 0 where they do not."""
        if isinstance(outcome, Stopped):
            pairs = zip(self._objectives, outcome.at_best, strict=True)
            best = {spec.name: value for spec, value in pairs if value > -math.inf}
            return {n: best[n] - limit for n, limit in self._limits.items() if n in best}
        scores, predicted = _rungs(outcome)
        values = {name: scores[name].value for name in self._limits if name in scores}
        values.update({name: predicted[name] for name in self._limits if name in predicted})
        return {n: value - self._limits[n] for n, value in values.items() if value is not None}


def error_attributes(error: Exception) -> dict[str, str]:
    """What a trial keeps of an error: one line, and the traceback."""
    text = {ERROR: one_line(error), TRACEBACK: _shortened_traceback(error)}
    return {name: redacted(value) for name, value in text.items()}


def one_line(error: Exception) -> str:
    """The first line of an error, with its class unless it is one that a user can mend."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, HereticKLError) else f"{type(error).__name__}: {text}"


def scores_to_json(scores: Mapping[str, Score]) -> str:
    """Scores by name, as text; values of single prompts to 7 digits, as there are many of them."""
    content = {name: score.to_dict() for name, score in scores.items()}
    for score in content.values():
        if "per_prompt" in score:
            score["per_prompt"] = [float(f"{value:.7g}") for value in score["per_prompt"]]
    return json.dumps(content)


def tested_prefix(tokens: int | None) -> str:
    """What the names of a study's attributes begin with that hold test scores, before the trial.

    `tokens` is N of their KL; None: as in trials. What is measured with another N stands apart, so
    that the two are never compared.
    """
    return "heretic-kl:test:" if tokens is None else f"heretic-kl:test@{tokens}:"


def scores_from_json(text: str) -> dict[str, Score]:
    """The inverse of `scores_to_json`."""
    return {name: Score.from_dict(data) for name, data in json.loads(text).items()}


def _shortened_traceback(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    if len(text) <= TRACEBACK_CHARACTERS:
        return text
    half = TRACEBACK_CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _objectives(trial: FrozenTrial) -> tuple[float, ...]:
    if PREDICTED in trial.user_attrs:  # Optuna holds what rung 1 said
        return tuple(json.loads(trial.user_attrs.get(OBJECTIVES, "[]")))
    return tuple(trial.values or ())


def _state(trial: FrozenTrial) -> TrialState:
    if trial.state == optuna.trial.TrialState.COMPLETE:
        screened = PREDICTED in trial.user_attrs and OBJECTIVES not in trial.user_attrs
        return "screened" if screened else "complete"
    if trial.state == optuna.trial.TrialState.PRUNED:
        return "stopped"
    return "interrupted" if trial.user_attrs.get(ERROR) == INTERRUPTED else "failed"


def _rungs(
    outcome: Mapping[str, Score] | Screened,
) -> tuple[Mapping[str, Score], Mapping[str, float]]:
    """Scores, and what rung 1 predicts in the place of some of them."""
    if isinstance(outcome, Screened):
        return outcome.scores, outcome.predicted
    return outcome, {}
