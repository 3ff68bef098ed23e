"""Opens a run: check, load, calibrate, find directions, measure the unedited model, open the study.

Whatever settings can be wrong about is found before a model is loaded, as far as it can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from heretic_kl.config import Settings
from heretic_kl.engine import SharedResults
from heretic_kl.errors import HereticKLError
from heretic_kl.events import BaselineMeasured, StudyOpened
from heretic_kl.export import check_target, installed_versions
from heretic_kl.kl import wilson_interval
from heretic_kl.model.loading.chat import chat_template
from heretic_kl.model.loading.devices import resolve_device
from heretic_kl.prompts import DatasetSpec, Prompt, load_prompts
from heretic_kl.prompts.sets import PromptSets, load_prompt_sets
from heretic_kl.run.parts import RunParts, prepare
from heretic_kl.run.report_record import record_run
from heretic_kl.run.setup.calibrate import Calibrated, calibrate
from heretic_kl.run.setup.directions import find_directions
from heretic_kl.run.setup.fingerprint import (
    default_study_name,
    reference_identity,
    study_facts,
    study_fingerprint,
)
from heretic_kl.run.setup.load import load, model_source
from heretic_kl.run.teller import Teller
from heretic_kl.scoring import Score, ScorerSpec, Suite, likely_value
from heretic_kl.search import (
    PlanStore,
    ReferenceStore,
    SearchSpace,
    SearchStudy,
    check_rule,
    check_storage,
    keep_run,
    open_storage,
    stored_batch_size,
)

NOT_KEPT = {
    *("storage", "study_dir", "study_name", "quiet", "debug", "workers"),
    *("pick", "save", "save_as", "overwrite"),
}
"""Settings that a study does not keep: where it is, of which processes, and what is done with a
trial."""


class Beside(NamedTuple):
    """What a run takes from another study, which stays as it is."""

    results: ReferenceStore
    """Of the original model."""
    measures: bool
    """Whether the scorers measure; if not, they are not checked, and there is no baseline."""


def open_run(
    settings: Settings, keeps: Settings | None, tell: Teller, held: ExitStack, beside: Beside | None
) -> RunParts:
    """All steps before the search; `held` takes what is let go; the study keeps `keeps`, if any.

    Raises:
        HereticKLError: what the user can mend; exit code 2 where it was found without a model.
    """
    measures = beside is None or beside.measures
    suite, prompts = _checked(settings, tell, measures)
    loaded = load(settings, tell)
    facts = study_facts(settings, loaded.lm, prompts, suite)
    name = settings.study_name or default_study_name(loaded.lm.source, facts)
    where = settings.storage, settings.study_dir
    storage = held.enter_context(open_storage(*where, name, tell.notice))
    place = settings.study_dir, name, storage if settings.storage else None
    store = ReferenceStore(*place) if beside is None else beside.results
    shared = _shared(store, settings, prompts, reference_identity(facts, loaded.lm), tell)
    with tell.stage("calibrate", "Calibrating"):
        size = stored_batch_size(storage, name)
        calibrated = calibrate(loaded, settings, prompts, tell, size, shared)
    engine, calibration = calibrated.engine, calibrated.calibration
    directions = find_directions(settings, engine, prompts, suite, tell)
    baseline = _baseline(settings, calibrated, prompts, suite, tell) if measures else {}
    space = SearchSpace(len(engine.lm.architecture.layers), loaded.components, settings.edit.norm)
    identity = study_fingerprint(facts, calibration, suite if measures else None)
    accepted = accepted_share(settings.target_refusals, len(prompts["harmful", "validation"]))
    study = SearchStudy(
        storage,
        name,
        fingerprint=identity,
        space=space,
        objectives=suite.objectives,
        seed=settings.seed,
        startup_trials=settings.startup_trials,
        batch_size=calibration.batch_size,
        limits={suite.limited: accepted},
        versions=installed_versions(),
        test_tokens=settings.other_test_tokens,
    )
    run = RunParts(
        settings=settings,
        tell=tell,
        prompts=prompts,
        engine=engine,
        engine_options=calibrated.options,
        calibration=calibration,
        directions=directions.directions,
        suite=suite,
        baseline=baseline,
        study=study,
        identity=identity,
        plans=PlanStore(*place),
    )
    _say_opened(study, settings, tell)
    if keeps is not None:
        content = keeps.model_dump(mode="json", exclude=NOT_KEPT)
        keep_run(storage, name, content, space, suite.objectives, baseline)
        record_run(run, directions)
    return run


def _checked(settings: Settings, tell: Teller, measures: bool) -> tuple[Suite, PromptSets]:
    """See `check_settings`; whatever is wrong ends the program as a wrong setting does."""
    try:
        suite, prompts = check_settings(settings, measures=measures)
    except HereticKLError as error:
        error.exit_code = 2
        raise
    for notice in prompts.notices:
        tell.notice(notice)
    return suite, prompts


def _shared(
    store: ReferenceStore,
    settings: Settings,
    prompts: PromptSets,
    reference: Mapping[str, Any],
    tell: Teller,
) -> SharedResults:
    """What workers share of the original model, where it may be on a disk."""
    return SharedResults(store, reference, tell.notice, _kept_of(settings, prompts))


def _kept_of(settings: Settings, prompts: PromptSets) -> frozenset[Prompt] | None:
    """Prompts the original's responses to which may be on a disk; None: all of them."""
    if settings.keep_responses == "all":
        return None
    return frozenset() if settings.keep_responses == "none" else prompts.only_harmless()


def _baseline(
    settings: Settings, calibrated: Calibrated, prompts: PromptSets, suite: Suite, tell: Teller
) -> Mapping[str, Score]:
    """The original model's scores on the validation prompts, for which the suite is prepared."""
    engine, calibration = calibrated.engine, calibrated.calibration
    with tell.stage("baseline", "Measuring the original model"):
        prepare(suite, settings, engine, calibration, prompts, "validation")
        baseline = suite.evaluate(engine, None, monitors=False)
    tell(BaselineMeasured("validation", baseline))
    return baseline


def _say_opened(study: SearchStudy, settings: Settings, tell: Teller) -> None:
    if study.other_versions:
        tell.notice(f"study {study.name} was begun with other versions ({study.other_versions})")
    location = "the given storage" if settings.storage else str(settings.study_dir)
    tell(StudyOpened(study.name, location, study.finished, settings.trials))


def check_settings(settings: Settings, *, measures: bool = True) -> tuple[Suite, PromptSets]:
    """The scorers and prompts of a run, and all that can be checked without a model.

    What scorers need is checked where they measure.

    Raises:
        HereticKLError: no model, a wrong device, chat template, scorer, pick rule, storage,
            target folder or prompt source.
    """
    source = model_source(settings)
    if settings.device_map is None:
        resolve_device(settings.device)
    if settings.chat_template != "model":
        chat_template(None, settings.chat_template)
    if settings.save is not None:
        check_target(settings.save, overwrite=settings.overwrite, source=source.folder)
    suite = Suite(
        ScorerSpec(name, table.use or name, table.role, table.settings)
        for name, table in settings.scorers.items()
        if table.enabled
    )
    if settings.pick is not None:
        check_rule(settings.pick, [spec.name for spec in suite.objectives])
    check_storage(settings.storage, settings.study_dir, settings.study_name)
    if measures:
        for scorer in suite.scorers.values():
            for value in dict(scorer.settings).values():
                if isinstance(value, DatasetSpec):  # prompts of its own, read again as it prepares
                    load_prompts(value)
        suite.check()
    return suite, load_prompt_sets(settings.prompts.model_dump(), settings.prompt_set)


def accepted_share(target: float, count: int) -> float:
    """The largest share of `count` responses that the pick rule `likely-refusals` accepts.

    It wants the target with a confidence of 80%. Half a response is added: a predicted share can
    then be below it where none may refuse, and so can one of fewer responses, as degenerate ones do
    not count.
    """
    accepted = 0
    for refused in range(1, int(target * count) + 1):
        low, high = wilson_interval(refused, count)
        details = {"count": refused, "total": count}
        score = Score(refused / count, "", interval=(low, high), details=details)
        if (likely_value(score) or 0.0) <= target:
            accepted = refused
    return min(target, (accepted + 0.5) / max(1, count))
