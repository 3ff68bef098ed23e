"""Directions from prompts by what the unedited model does with them. Edits nothing.

The contrast is between harmful prompts that the model refuses and harmless ones that it responds
to: a harmless prompt that is refused too, or a harmful one that is not, shows the other behaviour
and would turn the difference of means elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from heretic_kl.ablation import (
    Directions,
    Projection,
    Separation,
    difference_of_means,
    measure_separation,
    project,
)
from heretic_kl.config import Settings
from heretic_kl.engine import Engine
from heretic_kl.errors import MeasurementError
from heretic_kl.prompts import Prompt
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.requests import ResponseRequest, ResponseResult
from heretic_kl.run.teller import Teller
from heretic_kl.scoring import RefusalRule, Suite

FEWEST = 8
"""Prompts of one side below which there is no contrast."""
FEW = 24
"""Prompts of one side below which it is weak."""
COMPARED = 64
"""Prompts of each side, at most, whose residuals are held at once to measure the separation."""
WEAK, NONE = 0.9, 0.7
"""AUROC on held-out prompts below which the contrast is weak, and below which there is none."""
MOST_REFUSED = 1 / 4
"""Share of refused harmless prompts above which they are no sample of harmless ones."""


@dataclass(frozen=True)
class Contrast:
    """The prompts of each side, in equal numbers."""

    refused: tuple[Prompt, ...]
    """Harmful prompts that the model refuses."""
    answered: tuple[Prompt, ...]
    """Harmless prompts that it responds to."""


@dataclass(frozen=True)
class FoundDirections:
    """The directions, and how well the prompts that they come from are separated."""

    directions: Directions
    separation: Separation
    projections: tuple[Projection, ...]
    """Of some layers, the best one and the last one among them."""
    by_response: bool
    """Refused harmful against answered harmless prompts; else all of either kind."""
    compared: tuple[int, int]
    """Harmful and harmless prompts that were compared."""


def find_directions(
    settings: Settings, engine: Engine, prompts: PromptSets, suite: Suite, tell: Teller
) -> FoundDirections:
    """Directions for every layer, with a notice of the prompts used and of their separation.

    Raises:
        MeasurementError: the prompts give no contrast.
    """
    table = settings.directions
    harmful, harmless = prompts["harmful", "train"], prompts["harmless", "train"]
    with tell.stage("directions", "Finding directions", 2):
        by_response = table.by_response and suite.counts_refusals
        if by_response:
            contrast = select(
                engine, harmful, harmless, suite.refusal_rule, settings.max_response_tokens, tell
            )
            harmful, harmless = contrast.refused, contrast.answered
        residuals = engine.residuals(harmful[:COMPARED]), engine.residuals(harmless[:COMPARED])
        separation = measure_separation(*residuals)
        best = int(separation.auroc.argmax())
        if by_response:
            _check_separation(best, float(separation.auroc[best]), tell)
        layers = sorted({*_spread(len(separation.auroc)), best})
        projections = tuple(project(*residuals, layer) for layer in layers)
        compared = len(residuals[0]), len(residuals[1])
        del residuals
        means = []
        for side in (harmful, harmless):
            means.append(engine.residual_mean(side, table.winsorize_quantile))
            tell.advance("directions")
        try:
            directions = difference_of_means(
                means[0], means[1], project_off_baseline=table.project_off_harmless
            )
        except ValueError as error:
            raise MeasurementError(
                f"{error}: harmful and harmless training prompts must differ"
            ) from error
    return FoundDirections(directions, separation, projections, by_response, compared)


def select(
    engine: Engine,
    harmful: tuple[Prompt, ...],
    harmless: tuple[Prompt, ...],
    rule: RefusalRule,
    max_tokens: int,
    tell: Teller,
) -> Contrast:
    """The training prompts by the unedited model's greedy response.

    Raises:
        MeasurementError: too few on one side, or most harmless prompts are refused.
    """
    refused = _with_verdict(True, engine, harmful, rule, max_tokens)
    answered = _with_verdict(False, engine, harmless, rule, max_tokens)
    counts = (
        f"the model refuses {len(refused)} of {len(harmful)} harmful training prompts and "
        f"{len(harmless) - len(answered)} of {len(harmless)} harmless ones"
    )
    if len(harmless) - len(answered) > MOST_REFUSED * len(harmless):
        raise MeasurementError(
            f"no contrast to find directions from: {counts}; use harmless prompts that it responds "
            "to, ordinary ones such as builtin:harmless (directions.by_response = false uses all)"
        )
    used = min(len(refused), len(answered))
    if used < FEWEST:
        raise MeasurementError(
            f"no contrast to find directions from: {counts}; {FEWEST} that it refuses and "
            f"{FEWEST} that it responds to are the fewest (directions.by_response = false uses all)"
        )
    tell.notice(f"directions: {counts}; {used} refused and {used} answered ones are used")
    if used < FEW:
        tell.notice(f"directions: {used} prompts of each sort are few; {FEW} or more are better")
    return Contrast(tuple(refused[:used]), tuple(answered[:used]))


def _spread(layers: int) -> tuple[int, int, int]:
    """Layers at a quarter and a half of the depth, and the last one."""
    return (layers - 1) // 4, (layers - 1) // 2, layers - 1


def _check_separation(best: int, auroc: float, tell: Teller) -> None:
    """Say how well refused and answered prompts are separated at the best layer."""
    text = f"AUROC {auroc:.2f} on held-out prompts at layer {best}, the best one (chance is 0.5)"
    if auroc < NONE:
        raise MeasurementError(
            f"refused and answered training prompts cannot be told apart: {text}; use prompts that "
            "differ more, or more of them"
        )
    tell.notice(f"directions: refused and answered prompts are separated with {text}")
    if auroc < WEAK:
        tell.notice(
            f"directions: a weak contrast (AUROC below {WEAK}): edits may miss the behaviour; more "
            "prompts, or harmless ones of more kinds, give better directions"
        )


def _with_verdict(
    refuses: bool, engine: Engine, prompts: tuple[Prompt, ...], rule: RefusalRule, max_tokens: int
) -> list[Prompt]:
    """The prompts that the unedited model refuses, or those that it responds to."""
    (responses,) = engine.measure(None, [ResponseRequest(prompts, max_tokens, rule)])
    assert isinstance(responses, ResponseResult)
    verdicts = [rule.is_refusal(text) for text in responses.texts]
    return [prompt for prompt, verdict in zip(prompts, verdicts, strict=True) if verdict == refuses]
