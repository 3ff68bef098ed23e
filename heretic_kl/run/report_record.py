"""Records beside the study what a report shows and the study does not hold. One step of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from heretic_kl.ablation import Plan, Projection, Separation
from heretic_kl.config import Settings
from heretic_kl.engine import Calibration
from heretic_kl.errors import StudyError
from heretic_kl.export import (
    PromptFacts,
    SavedForm,
    installed_versions,
    machine,
    original_commit,
    portable,
    portable_base,
)
from heretic_kl.model import LanguageModel
from heretic_kl.prompts import DatasetSpec, Kind, Prompt, dataset_revision
from heretic_kl.prompts.sets import PromptSets
from heretic_kl.run.parts import RunParts
from heretic_kl.run.saving.command import reproducing_command
from heretic_kl.run.setup.directions import FoundDirections
from heretic_kl.run.trials.preview import respond
from heretic_kl.scoring import MeasuringEngine
from heretic_kl.search import RunFile, TrialRecord

SHOWN_RESPONSES = 8
"""Test prompts of a kind whose responses are recorded."""
KEPT_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "none": (),
    "report": ("harmless",),
    "harmless": ("harmless",),
    "all": ("harmless", "borderline", "harmful"),
}
"""Setting `keep_responses` -> kinds of prompts whose responses are recorded."""


def record_run(run: RunParts, directions: FoundDirections) -> None:
    """Record model and separation; costs a notice where the file cannot be written."""
    entries = {
        **run_facts(run.lm, run.calibration, run.prompts),
        "test_prompts": run.prompts.texts("test"),
        "directions": _directions(directions),
    }
    _write(run, entries)


def run_facts(lm: LanguageModel, calibration: Calibration, prompts: PromptSets) -> dict[str, Any]:
    """Model, versions, machine, calibration and prompts, fit to be shown to others."""
    return {
        "model": portable_base(lm.source),
        "versions": installed_versions(),
        "machine": machine(),
        "calibration": {
            "dtype": calibration.dtype,
            "device": calibration.device,
            "threads": calibration.threads,
            "batch size": calibration.batch_size,
            "response prefix": calibration.response_prefix,
            "noise floor": calibration.noise_floor.text,
        },
        "prompts": portable([vars(facts) for facts in prompt_facts(prompts)]),
    }


def test_responses(run: RunParts, plan: Plan | None) -> Mapping[str, tuple[str, ...]]:
    """Responses to some test prompts, which the log hears; see `shown_responses`."""
    return shown_responses(run.response_log.engine, plan, run.settings, run.prompts.of("test"))


def record_test(
    run: RunParts, record: TrialRecord, responses: Mapping[str, tuple[str, ...]]
) -> None:
    """Record what was responded under a tested trial's edit, and the command that finds it."""
    command = command_of(run, record, "edited-model", run.settings.save_as)
    entries: dict[str, Any] = {
        "commands": {str(record.number): command},
        "responses": {str(record.number): responses},
    }
    if responses:
        prompts = run.prompts.of("test")  # the engine keeps what the original responded to them
        reference = shown_responses(run.engine, None, run.settings, prompts)
        entries["responses"]["reference"] = reference
    _write(run, entries)


def command_of(run: RunParts, record: TrialRecord, name: str, form: SavedForm) -> str:
    """The command that finds a trial again and saves it as `name`; see `reproducing_command`."""
    source = run.lm.source
    is_hub_id = source.folder is None and source.gguf_file is None
    return reproducing_command(
        run.settings,
        run.calibration,
        base=portable_base(source),
        revision=original_commit(run.lm) if is_hub_id else None,
        prompt_set=run.prompts.prompt_set,
        trial=record.number,
        refined=record.refinement is not None,
        name=name,
        form=form,
    )


def record_saved(run: RunParts, number: int) -> None:
    """Record which trial's model was saved last: the report is about it."""
    _write(run, {"saved": {"trial": number}})


def prompt_facts(prompts: PromptSets) -> tuple[PromptFacts, ...]:
    """Every set of prompts that the run uses."""
    prints, sources = prompts.fingerprints(), prompts.sources()
    return tuple(
        PromptFacts(
            kind,
            use,
            sources[f"{kind}.{use}"],
            len(members),
            prints[f"{kind}.{use}"],
            _revision(prompts.specs[kind, use]),
        )
        for (kind, use), members in prompts.prompts.items()
    )


def _revision(spec: DatasetSpec) -> str | None:
    """Commits of the hub's datasets in it, in order."""
    commits = [dataset_revision(part.source, part.revision) for part in spec.parts()]
    return " + ".join(commit or "unknown" for commit in commits) if any(commits) else None


def shown_responses(
    engine: MeasuringEngine,
    plan: Plan | None,
    settings: Settings,
    sets: Mapping[Kind, tuple[Prompt, ...]],
) -> dict[str, tuple[str, ...]]:
    """Whole responses to the first prompts of the kinds that the settings keep, by kind.

    `plan` None: the unedited model.
    """
    return {
        kind: respond(engine, plan, sets[kind][:SHOWN_RESPONSES], settings.max_response_tokens)
        for kind in KEPT_KINDS[settings.keep_responses]
    }


def _directions(directions: FoundDirections) -> dict[str, Any]:
    harmful, harmless = directions.compared
    return {
        "by_response": directions.by_response,
        "harmful": harmful,
        "harmless": harmless,
        "layers": _layers(directions.separation),
        "projections": [_projection(projection) for projection in directions.projections],
    }


def _layers(separation: Separation) -> dict[str, list[float]]:
    """Measure -> its value a layer."""
    return {f.name: getattr(separation, f.name).tolist() for f in fields(Separation)}


def _projection(projection: Projection) -> dict[str, Any]:
    return {
        "layer": projection.layer,
        "variance": projection.variance,
        "refused": projection.refused.tolist(),
        "answered": projection.answered.tolist(),
    }


def _write(run: RunParts, entries: Mapping[str, Any]) -> None:
    try:
        RunFile(run.settings.study_dir, run.study.name).update(entries)
    except StudyError as error:
        run.tell.notice(f"the report of this run will show less: {error}")
