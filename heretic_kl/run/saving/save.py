"""Saves a trial's model, reads it back, measures it again and writes down what it cost.

Chooses nothing and searches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from heretic_kl.ablation import Plan
from heretic_kl.engine import mean_kl
from heretic_kl.events import ModelSaved
from heretic_kl.export import (
    LEARNED_FILE,
    ExportFacts,
    LoraFacts,
    SavedForm,
    ScoreFacts,
    installed_versions,
    machine,
    original_commit,
    portable_base,
    save_lora,
    save_merged,
    saved_model,
    stated_license,
    write_card,
    write_reproduction,
)
from heretic_kl.kl import METRIC_VERSION
from heretic_kl.ranks import is_first
from heretic_kl.run.engines import build_engine
from heretic_kl.run.parts import RunParts
from heretic_kl.run.report_record import command_of, prompt_facts, record_saved
from heretic_kl.run.trials.test import test_baseline, test_one
from heretic_kl.scoring import Score
from heretic_kl.search import TrialRecord


def save_trial(
    run: RunParts,
    record: TrialRecord,
    plan: Plan,
    folder: Path,
    form: SavedForm,
    *,
    overwrite: bool,
    pick_rule: str | None,
    trials: int | None = None,
) -> ModelSaved:
    """Write the model, measure what was written, and put a card and a reproduction file beside it.

    `trials` is how many there were to pick from; None: those of the study.

    Raises:
        ExportError: it cannot be written, or does not load again.
    """
    engine = run.engine
    original, trial_scores = test_baseline(run), test_one(run, record.number)
    engine.release()  # a second model is about to be loaded
    lora = _write(run, plan, folder, form, overwrite=overwrite)
    saved_scores, merge_kl = measure_saved(run, plan, folder, form)
    roles = {spec.name: spec.role for spec in run.test_suite.specs}
    scores = {
        name: ScoreFacts(
            original.get(name),
            score,
            saved_scores.get(name),
            kind=_kind_of_prompts(run, name),
            unit=run.test_suite.scorers[name].unit,
            role=roles[name],
            meaning=run.test_suite.scorers[name].meaning(),
        )
        for name, score in trial_scores.items()
    }
    facts = _facts(run, record, folder, form, scores, merge_kl, lora, pick_rule)
    if trials is not None:
        facts = replace(facts, trials=trials)
    if record.refinement is not None:
        run.plans.copy(record.refinement.sha256, folder / LEARNED_FILE)
    if is_first():
        write_card(folder, facts)
        write_reproduction(folder, facts)
    record_saved(run, record.number)
    floor = run.calibration.noise_floor
    return ModelSaved(
        folder=folder,
        form=form,
        saved_scores=saved_scores,
        trial_scores=trial_scores,
        merge_kl=merge_kl,
        noise_floor=max(floor.rounding or 0.0, floor.batching),
    )


def measure_saved(
    run: RunParts, plan: Plan, folder: Path, form: SavedForm
) -> tuple[dict[str, Score], float]:
    """A saved model's scores on the test prompts, and how far it is from a plan's operators.

    Returns:
        The scores, and KL(operators || saved model) in nats, mean over positions, then prompts.

    Raises:
        ExportError: it does not load, or does not fit.
    """
    engine = run.engine
    positions = run.prompts["harmless", "test"], run.settings.kl_tokens
    reference = engine.reference_under(plan, *positions)
    # Before the adapter's hooks are on the original: references are the unedited model's.
    engine.prepare(run.test_suite.requests())
    options = replace(run.engine_options, batch_size=engine.batch_size)
    with saved_model(folder, form, engine.lm) as saved:
        reread = build_engine(saved, options, notify=run.tell.notice, original=engine)
        scores = run.test_suite.evaluate(reread, {})
        kl = mean_kl(
            reference,
            reread.hidden_states({}, *positions),
            head=engine.lm.head,
            candidate_head=saved.head,
        )
    return scores, kl


def _write(
    run: RunParts, plan: Plan, folder: Path, form: SavedForm, *, overwrite: bool
) -> LoraFacts | None:
    """Write the weights; how near an adapter comes to the edit."""
    if form == "merged":
        name = run.settings.save_dtype
        dtype = None if name == "source" else getattr(torch, name)
        save_merged(run.lm, plan, folder, dtype=dtype, overwrite=overwrite)
        return None
    return save_lora(run.lm, plan, folder, overwrite=overwrite)


def _facts(
    run: RunParts,
    record: TrialRecord,
    folder: Path,
    form: SavedForm,
    scores: Mapping[str, ScoreFacts],
    merge_kl: float,
    lora: LoraFacts | None,
    pick_rule: str | None,
) -> ExportFacts:
    source, settings = run.lm.source, run.settings
    is_hub_id = source.folder is None and source.gguf_file is None
    name, floor = folder.resolve().name, run.calibration.noise_floor
    dtype = settings.save_dtype
    assert record.edit is not None
    return ExportFacts(
        name=name,
        form=form,
        base_name=portable_base(source),
        base_is_hub_id=is_hub_id,
        base_revision=original_commit(run.lm) if is_hub_id else None,
        saved_dtype="as stored in the original" if dtype == "source" else dtype,
        trial_number=record.number,
        trials=run.study.finished,
        pick_rule=pick_rule,
        parameters=record.parameters,
        edit=record.edit,
        layers=len(run.lm.architecture.layers),
        scores=scores,
        validation_scores=record.scores,
        kl_tokens=settings.kl_tokens,
        metric_version=METRIC_VERSION,
        noise_floor=floor.batching,
        rounding_floor=floor.rounding,
        merge_kl=merge_kl,
        prompts=prompt_facts(run.prompts),
        settings=settings.model_dump(mode="json"),
        command=command_of(run, record, name, form),
        seed=settings.seed,
        versions=installed_versions(),
        platform=machine(),
        license=stated_license(folder),
        lora=lora,
        by_response=settings.directions.by_response and run.suite.counts_refusals,
        identity=run.identity,
        calibration=_found_out(run),
        test_kl_tokens=settings.test_kl_tokens,
    )


def _kind_of_prompts(run: RunParts, scorer: str) -> str | None:
    """The kind whose test prompts a scorer is measured on; None: prompts of its own."""
    requests = run.test_suite.scorers[scorer].requests()
    prompts = getattr(requests[0], "prompts", None) if requests else None
    kinds = (kind for kind, members in run.prompts.of("test").items() if members == prompts)
    return next(kinds, None)


def _found_out(run: RunParts) -> dict[str, Any]:
    names = ("dtype", "device", "threads", "batch_size", "response_prefix")
    values = {name: getattr(run.calibration, name) for name in names}
    return {**values, "prompt_set": run.prompts.prompt_set}
