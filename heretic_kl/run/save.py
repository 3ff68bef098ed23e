"""Saves a trial's model, reads it back, measures it again and writes down what it cost.

Chooses nothing and searches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from heretic_kl.ablation import Plan
from heretic_kl.engine import mean_kl
from heretic_kl.events import ModelSaved
from heretic_kl.export import (
    ExportFacts,
    LoraFacts,
    PromptFacts,
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
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.run.command import reproducing_command
from heretic_kl.run.engines import build_engine
from heretic_kl.run.parts import RunParts
from heretic_kl.scoring import Score
from heretic_kl.search import TrialRecord


@dataclass(frozen=True)
class TrialToSave:
    """One trial and everything that a card says about it."""

    record: TrialRecord
    plan: Plan
    scores: Mapping[str, Score]
    """On the test prompts, the operators in force."""
    original: Mapping[str, Score]
    """Of the unedited model, on the same prompts."""
    trials: int
    """Finished in the study."""
    pick_rule: str | None
    """None: picked by hand."""


def save_trial(
    run: RunParts, trial: TrialToSave, folder: Path, form: SavedForm, *, overwrite: bool
) -> ModelSaved:
    """Write the model, measure what was written, and put a card and a reproduction file beside it.

    Args:
        run: the open run.
        trial: what to save.
        folder: where to.
        form: a whole model, or an adapter for the original.
        overwrite: replace what stands there.

    Raises:
        ExportError: it cannot be written, or does not load again.
    """
    engine = run.engine
    engine.release()  # a second model is about to be loaded
    lora = _write(run, trial, folder, form, overwrite=overwrite)
    positions = run.prompts["harmless", "test"], run.settings.kl_tokens
    reference = engine.reference_under(trial.plan, *positions)
    # Before the adapter's hooks are on the original: references are the unedited model's.
    engine.prepare(run.test_suite.requests())
    options = replace(run.engine_options, batch_size=engine.batch_size)
    with saved_model(folder, form, engine.lm) as saved:
        reread = build_engine(saved, options, notify=run.tell.notice, original=engine)
        saved_scores = run.test_suite.evaluate(reread, {})
        merge_kl = mean_kl(
            reference,
            reread.hidden_states({}, *positions),
            head=engine.lm.head,
            candidate_head=saved.head,
        )
    facts = _facts(run, trial, folder, form, saved_scores, merge_kl, lora)
    write_card(folder, facts)
    write_reproduction(folder, facts)
    floor = run.calibration.noise_floor
    return ModelSaved(
        folder=folder,
        form=form,
        saved_scores=saved_scores,
        trial_scores=trial.scores,
        merge_kl=merge_kl,
        noise_floor=max(floor.rounding or 0.0, floor.batching),
    )


def _write(
    run: RunParts, trial: TrialToSave, folder: Path, form: SavedForm, *, overwrite: bool
) -> LoraFacts | None:
    """Write the weights; how near an adapter comes to the edit."""
    if form == "merged":
        name = run.settings.save_dtype
        dtype = None if name == "source" else getattr(torch, name)
        save_merged(run.lm, trial.plan, folder, dtype=dtype, overwrite=overwrite)
        return None
    written = save_lora(run.lm, trial.plan, folder, overwrite=overwrite)
    return LoraFacts(
        rank=written.rank,
        exact=written.exact,
        relative_error=written.relative_error,
        worst_relative_error=max(written.site_errors.values(), default=0.0),
    )


def _facts(
    run: RunParts,
    trial: TrialToSave,
    folder: Path,
    form: SavedForm,
    saved_scores: Mapping[str, Score],
    merge_kl: float,
    lora: LoraFacts | None,
) -> ExportFacts:
    source, settings = run.lm.source, run.settings
    is_hub_id = source.folder is None and source.gguf_file is None
    revision = original_commit(run.lm) if is_hub_id else None
    name, floor = folder.resolve().name, run.calibration.noise_floor
    dtype = settings.save_dtype
    assert trial.record.edit is not None
    return ExportFacts(
        name=name,
        form=form,
        base_name=portable_base(source),
        base_is_hub_id=is_hub_id,
        base_revision=revision,
        saved_dtype="as stored in the original" if dtype == "source" else dtype,
        trial_number=trial.record.number,
        trials=trial.trials,
        pick_rule=trial.pick_rule,
        parameters=trial.record.parameters,
        edit=trial.record.edit,
        layers=len(run.lm.architecture.layers),
        scores={
            scorer: ScoreFacts(trial.original.get(scorer), score, saved_scores.get(scorer))
            for scorer, score in trial.scores.items()
        },
        validation_scores=trial.record.scores,
        kl_tokens=settings.kl_tokens,
        noise_floor=floor.batching,
        rounding_floor=floor.rounding,
        merge_kl=merge_kl,
        prompts=_prompt_facts(run.prompts),
        settings=settings.model_dump(mode="json"),
        command=reproducing_command(
            settings,
            run.calibration,
            base=portable_base(source),
            revision=revision,
            prompt_set=run.prompts.prompt_set,
            trial=trial.record.number,
            refined=trial.record.edit.refinement is not None,
            name=name,
            form=form,
        ),
        seed=settings.seed,
        versions=installed_versions(),
        platform=machine(),
        license=stated_license(folder),
        lora=lora,
    )


def _prompt_facts(prompts: PromptSets) -> tuple[PromptFacts, ...]:
    prints, sources = prompts.fingerprints(), prompts.sources()
    return tuple(
        PromptFacts(kind, use, sources[f"{kind}.{use}"], len(members), prints[f"{kind}.{use}"])
        for (kind, use), members in prompts.prompts.items()
    )
