"""Measures edits that exist already, whoever made them, with every scorer. Searches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from heretic_kl.config import Settings
from heretic_kl.errors import SelectionError
from heretic_kl.events import BaselineMeasured
from heretic_kl.export import other_model, portable_base
from heretic_kl.model import ModelSource
from heretic_kl.prompts import Kind, Prompt
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.run.engines import build_engine
from heretic_kl.run.parts import RunParts, prepare
from heretic_kl.run.report_record import run_facts, shown_responses
from heretic_kl.run.saving.command import evaluating_command
from heretic_kl.run.setup.calibrate import Calibrated, calibrate
from heretic_kl.run.setup.load import load
from heretic_kl.run.setup.open_run import check_settings
from heretic_kl.run.teller import Teller
from heretic_kl.scoring import (
    PairedDifference,
    Score,
    ScorerSpec,
    Suite,
    paired_scores,
    summed_judging,
)
from heretic_kl.search import TrialRecord

Scores = Mapping[str, Score]
"""By scorer."""


@dataclass(frozen=True)
class EvaluatedModel:
    """One candidate beside the original."""

    name: str
    scores: Mapping[str, Score]
    minus_original: Mapping[str, PairedDifference]
    """By scorer whose score is a mean over prompts."""
    minus_first: Mapping[str, PairedDifference]
    """The same, minus the first candidate; empty for that one."""
    responses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """To the first prompts, by kind; empty where nobody asked for them."""


@dataclass(frozen=True)
class Evaluation:
    """The original and every candidate, on the same prompts."""

    original: str
    use: Literal["validation", "test"]
    prompts: Mapping[str, int]
    """How many, by kind."""
    scores: Mapping[str, Score]
    """Of the original."""
    candidates: tuple[EvaluatedModel, ...]
    roles: Mapping[str, str] = field(default_factory=dict)
    """Objective -> minimize or maximize, in the order of the settings."""
    prompt_texts: Mapping[Kind, Sequence[str]] = field(default_factory=dict)
    """By kind."""
    responses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Of the original; see `EvaluatedModel.responses`."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What it was measured with; see `run_facts`."""
    command: str = ""
    """A line for a shell that measures the same again."""


def evaluate(
    settings: Settings,
    candidates: Sequence[str],
    use: Literal["validation", "test"],
    tell: Teller,
) -> Evaluation:
    """Measure the original and candidates, one loaded after the other.

    Args:
        settings: of a run on the original; what concerns searching and saving has no say.
            `keep_responses` says which responses to the first prompts are kept.
        candidates: hub ids (also ID@REVISION), folders, .gguf files and folders of PEFT adapters.
        use: which prompts.
        tell: told what happens.

    Raises:
        HereticKLError: anything the user can mend about a model, prompts or scorers.
    """
    suite, prompts = check_settings(settings)
    for notice in prompts.notices:
        tell.notice(notice)
    loaded = load(settings, tell)
    with tell.stage("calibrate", "Calibrating"):
        calibrated = calibrate(loaded, settings, prompts, tell, None)
    engine = calibrated.engine
    with tell.stage("baseline", "Measuring the original model"):
        calibration = calibrated.calibration
        prepare(suite, settings, engine, calibration, prompts, use)
        scores = suite.evaluate(engine, None)
        responses = shown_responses(engine, None, settings, prompts.of(use))
    tell(BaselineMeasured(use, scores))
    evaluated: list[EvaluatedModel] = []
    first: Scores = {}
    for name in candidates:
        with tell.stage("measure", f"Measuring {name}"):
            theirs, texts = _measure(name, settings, calibrated, suite, prompts.of(use), tell)
        minus_first = _paired(theirs, first) if evaluated else {}
        first = first or theirs
        pairs = _paired(theirs, scores)
        evaluated.append(EvaluatedModel(name, theirs, pairs, minus_first, texts))
    tell.judged(summed_judging([suite.judging()]))
    return Evaluation(
        str(settings.model),
        use,
        {kind: len(members) for kind, members in prompts.of(use).items()},
        scores,
        tuple(evaluated),
        roles={spec.name: spec.role for spec in suite.objectives},
        prompt_texts=prompts.texts(use),
        responses=responses,
        facts=_facts(calibrated, prompts, use),
        command=evaluating_command(
            settings,
            calibration,
            candidates,
            base=portable_base(loaded.lm.source),
            prompt_set=prompts.prompt_set,
            use=use,
        ),
    )


def evaluate_trial(run: RunParts, record: TrialRecord, specs: Sequence[ScorerSpec]) -> Evaluation:
    """Measure a trial's edit and the original with other scorers than the study's.

    Raises:
        SelectionError: the trial has no edit.
        ScorerError: a scorer cannot be built or run.
    """
    if record.edit is None:
        raise SelectionError(f"trial {record.number} was interrupted and has no edit")
    plan, suite = run.plan(record.edit), Suite(specs)
    prepare(suite, run.settings, run.engine, run.calibration, run.prompts, "test")
    with run.tell.stage("measure", "Measuring the original model"):
        scores = suite.evaluate(run.engine, None)
    with run.tell.stage("measure", f"Measuring trial {record.number}"):
        theirs = suite.evaluate(run.engine, plan)
    model = EvaluatedModel(f"trial {record.number}", theirs, _paired(theirs, scores), {})
    return Evaluation(str(run.settings.model), "test", {}, scores, (model,))


def _measure(
    name: str,
    settings: Settings,
    calibrated: Calibrated,
    suite: Suite,
    prompts: Mapping[Kind, tuple[Prompt, ...]],
    tell: Teller,
) -> tuple[dict[str, Score], Mapping[str, Sequence[str]]]:
    engine = calibrated.engine
    engine.release()
    # Before the original leaves a GPU: a candidate is measured against its references.
    engine.prepare(suite.requests())
    options = replace(calibrated.options, batch_size=engine.batch_size)
    base = None if settings.base is None else ModelSource.named(settings.base)
    with other_model(
        ModelSource.named(name), engine.lm, base=base, trust_remote_code=settings.trust_remote_code
    ) as lm:
        theirs = build_engine(lm, options, notify=tell.notice, original=engine)
        return suite.evaluate(theirs, {}), shown_responses(theirs, {}, settings, prompts)


def _facts(calibrated: Calibrated, prompts: PromptSets, use: str) -> dict[str, Any]:
    """What the run found out, and of its prompts those that were measured on."""
    facts = run_facts(calibrated.engine.lm, calibrated.calibration, prompts)
    return {**facts, "prompts": [entry for entry in facts["prompts"] if entry["use"] == use]}


def _paired(scores: Scores, others: Scores) -> dict[str, PairedDifference]:
    pairs = {name: paired_scores(scores[name], others[name]) for name in scores if name in others}
    return {name: pair for name, pair in pairs.items() if pair is not None}
