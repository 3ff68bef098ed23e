"""Saves a trial's model, reads it back, measures it again and writes down what it cost.

Chooses nothing and searches nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from heretic_kl.ablation import Plan
from heretic_kl.config import Settings
from heretic_kl.engine import Calibration, Engine, mean_kl
from heretic_kl.events import ModelSaved
from heretic_kl.export import (
    ExportFacts,
    LoraFacts,
    PromptFacts,
    SavedForm,
    ScoreFacts,
    installed_versions,
    machine,
    portable_base,
    save_lora,
    save_merged,
    saved_model,
    stated_license,
    write_card,
    write_reproduction,
)
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.scoring import Score, Suite
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
    trial: TrialToSave,
    folder: Path,
    form: SavedForm,
    *,
    overwrite: bool,
    engine: Engine,
    suite: Suite,
    settings: Settings,
    calibration: Calibration,
    prompts: PromptSets,
) -> ModelSaved:
    """Write the model, measure what was written, and put a card and a reproduction file beside it.

    Args:
        trial: what to save.
        folder: where to.
        form: a whole model, or an adapter for the original.
        overwrite: replace what stands there.
        engine: of the original model.
        suite: prepared for the test prompts.
        settings: of the run.
        calibration: of the run.
        prompts: of the run.

    Raises:
        ExportError: it cannot be written, or does not load again.
    """
    lm = engine.lm
    engine.release()  # a second model is about to be loaded
    lora = None
    if form == "lora":
        written = save_lora(lm, trial.plan, folder, overwrite=overwrite)
        lora = LoraFacts(
            rank=written.rank,
            exact=written.exact,
            relative_error=written.relative_error,
            worst_relative_error=max(written.site_errors.values(), default=0.0),
        )
    else:
        dtype = None
        if settings.save_dtype != "source":
            dtype = getattr(torch, settings.save_dtype)
        save_merged(lm, trial.plan, folder, dtype=dtype, overwrite=overwrite)
    positions = prompts["harmless", "test"], settings.kl_tokens
    reference = engine.reference_under(trial.plan, *positions)
    # Before the adapter's hooks are on the original: references are the unedited model's.
    engine.prepare(suite.requests())
    with saved_model(folder, form, lm) as saved:
        reread = Engine(
            saved,
            batch_size=engine.batch_size,
            share_prefix=engine.share_prefix,
            original=engine,
        )
        saved_scores = suite.evaluate(reread, {})
        merge_kl = mean_kl(
            reference,
            reread.hidden_states({}, *positions),
            head=lm.head,
            candidate_head=saved.head,
        )
    facts = _facts(
        trial,
        folder,
        form,
        saved_scores,
        merge_kl,
        engine=engine,
        settings=settings,
        calibration=calibration,
        prompts=prompts,
        lora=lora,
    )
    write_card(folder, facts)
    write_reproduction(folder, facts)
    floor = calibration.noise_floor
    return ModelSaved(
        folder=folder,
        form=form,
        saved_scores=saved_scores,
        trial_scores=trial.scores,
        merge_kl=merge_kl,
        noise_floor=max(floor.rounding or 0.0, floor.batching),
    )


def _facts(
    trial: TrialToSave,
    folder: Path,
    form: SavedForm,
    saved_scores: Mapping[str, Score],
    merge_kl: float,
    *,
    engine: Engine,
    settings: Settings,
    calibration: Calibration,
    prompts: PromptSets,
    lora: LoraFacts | None,
) -> ExportFacts:
    source = engine.lm.source
    local = source.folder is not None or source.gguf_file is not None
    assert trial.record.edit is not None
    return ExportFacts(
        name=folder.resolve().name,
        form=form,
        base_name=portable_base(source),
        base_is_hub_id=not local,
        base_revision=source.revision,
        saved_dtype="as stored in the original"
        if settings.save_dtype == "source"
        else settings.save_dtype,
        trial_number=trial.record.number,
        trials=trial.trials,
        pick_rule=trial.pick_rule,
        parameters=trial.record.parameters,
        edit=trial.record.edit,
        layers=len(engine.lm.architecture.layers),
        scores={
            name: ScoreFacts(trial.original.get(name), score, saved_scores.get(name))
            for name, score in trial.scores.items()
        },
        search_scores=trial.record.scores,
        kl_tokens=settings.kl_tokens,
        noise_floor=calibration.noise_floor.batching,
        rounding_floor=calibration.noise_floor.rounding,
        merge_kl=merge_kl,
        prompts=_prompt_facts(prompts),
        settings=settings.model_dump(mode="json"),
        command=_command(settings, trial.record.number, portable_base(source)),
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


def _command(settings: Settings, trial: int, base: str) -> str:
    """The command whose study holds this trial again; other settings are in heretic-kl.json."""
    words = ["heretic-kl", "--model", base]
    for name in ("kl_tokens", "trials", "startup_trials", "max_response_tokens", "seed"):
        words += [f"--{name.replace('_', '-')}", str(getattr(settings, name))]
    if settings.prompt_set != "auto":
        words += ["--prompt-set", settings.prompt_set]
    if settings.edit.norm != "none":
        words += ["--edit.norm", settings.edit.norm]
    return shlex.join([*words, "--pick", f"trial={trial}"])
