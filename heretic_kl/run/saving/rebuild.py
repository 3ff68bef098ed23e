"""Rebuilds a saved model from its reproduction file and compares the two. Searches nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch

from heretic_kl.ablation import Plan, plan_from_tensors
from heretic_kl.errors import ModelError, ReproductionError
from heretic_kl.events import ModelSaved
from heretic_kl.export import (
    Reproduction,
    SavedForm,
    file_index,
    installed_versions,
    machine,
    portable,
)
from heretic_kl.run.parts import RunParts
from heretic_kl.run.saving.save import measure_saved, save_trial
from heretic_kl.scoring import KL_TOKENS, Score
from heretic_kl.search import TrialRecord

Verdict = Literal["bit for bit", "within the noise floor", "differs"]


@dataclass(frozen=True)
class Difference:
    """One thing that is not what the reproduction file says."""

    what: str
    """`model weights`, `prompts.harmful.train`, `torch`."""
    then: str
    now: str


@dataclass(frozen=True)
class Comparison:
    """A rebuilt model beside what the reproduction file says of the saved one."""

    verdict: Verdict
    basis: str
    """What the verdict rests on, for people."""
    files: tuple[str, ...]
    """Names of files whose content differs."""
    kl: float | None
    """Nats, KL(rebuilt operators || saved model); None: the saved model is not at hand, or is the
    same bit for bit."""
    noise_floor: float
    """Nats: what rounding to the saved type costs an unchanged model."""
    scores: Mapping[str, tuple[Score | None, Score]]
    """On the test prompts: of the saved model as the file says, of the rebuilt one as measured."""
    differences: tuple[Difference, ...]


def rebuild(
    run: RunParts, wanted: Reproduction, folder: Path, *, overwrite: bool
) -> tuple[ModelSaved, Comparison]:
    """Write the model that a reproduction file describes, measure it, and compare.

    Args:
        run: of the file's settings; its study is thrown away later.
        wanted: the file.
        folder: where the model goes; nothing is written elsewhere.
        overwrite: a saved model that stands there may be replaced.

    Raises:
        ModelError: the model does not allow the edit, or what was learned is another's.
        ReproductionError: the learned operators are missing or changed.
    """
    trial = wanted.trial
    plan = _plan(run, wanted)
    record = TrialRecord(trial.number, "complete", trial.parameters, trial.edit)
    saved = save_from_elsewhere(
        run,
        record,
        folder,
        wanted.form,
        overwrite=overwrite,
        pick_rule=trial.pick_rule,
        trials=trial.of,
    )
    return saved, _compare(run, wanted, plan, saved)


def save_from_elsewhere(
    run: RunParts,
    record: TrialRecord,
    folder: Path,
    form: SavedForm,
    *,
    overwrite: bool,
    pick_rule: str | None,
    trials: int,
) -> ModelSaved:
    """Measure and save a trial that is not one of the run's study, all of it anew.

    Args:
        run: its plans hold what the trial learned.
        record: the trial; its scores have no say.
        folder: where the model goes.
        form: merged model or adapter.
        overwrite: a saved model that stands there may be replaced.
        pick_rule: what picked the trial.
        trials: how many there were.
    """
    assert record.edit is not None
    plan = run.plan(record.edit)
    (validation,) = run.suite.evaluate_objectives(run.engine, [plan])
    assert isinstance(validation, dict)  # nothing races
    run.study.keep_test_scores(record.number, run.test_suite.evaluate(run.engine, plan))
    record = replace(record, scores=validation)
    with run.tell.stage("save", "Saving and measuring the model"):
        saved = save_trial(
            run,
            record,
            plan,
            folder,
            form,
            overwrite=overwrite,
            pick_rule=pick_rule,
            trials=trials,
        )
    run.tell(saved)
    return saved


def check_fits(plan: Plan, run: RunParts) -> None:
    """Check that learned operators from elsewhere are of the run's model.

    Raises:
        ModelError: a site is missing, or writes something else.
    """
    sites = {site.key: site for site in run.lm.architecture.sites}
    for key, operator in plan.items():
        if key not in sites or len(operator.left) != len(sites[key].weight()):
            raise ModelError(f"the learned operators do not fit this model: {key.path}")


def _plan(run: RunParts, wanted: Reproduction) -> Plan:
    learned = wanted.learned()
    if learned is not None:
        try:
            plan = plan_from_tensors(safetensors.torch.load(learned))
        except (ValueError, safetensors.SafetensorError) as error:
            raise ReproductionError(f"the learned operators cannot be read: {error}") from error
        check_fits(plan, run)
        run.plans.save(plan)
    edit = wanted.trial.edit
    depth, position = len(run.lm.architecture.layers), edit.direction_position
    if position is not None and not 0 <= position <= depth - 1:
        raise ModelError(f"the edit takes its direction at layer {position:g} of {depth}")
    return run.plan(edit)


def _compare(run: RunParts, wanted: Reproduction, plan: Plan, saved: ModelSaved) -> Comparison:
    index = file_index(saved.folder)
    names = sorted(set(index) | set(wanted.files))
    files = tuple(name for name in names if not _same_file(name, index, wanted))
    weights = {name for name in names if name.endswith(".safetensors")}
    scores = {n: (_saved(wanted, n, score), score) for n, score in saved.saved_scores.items()}
    floor, kl = saved.noise_floor, None
    if not weights & set(files):
        verdict: Verdict = "bit for bit"
        basis = "every byte of the weights is the same"
    elif wanted.weights_beside(index):
        _, kl = measure_saved(run, plan, wanted.folder, wanted.form)
        verdict = "within the noise floor" if kl <= floor else "differs"
        basis = "the saved model was measured against the rebuilt edit"
    else:
        near = all(_as_near(then, now, floor) for then, now in scores.values())
        verdict = "within the noise floor" if near else "differs"
        basis = "the saved model is not beside the file, so scores on the test prompts decide"
    lengths = [
        Difference(f"positions of {name} on test prompts", _short(then), _short(now))
        for name, (_, score) in scores.items()
        if (then := _tokens(wanted, name, score)) != (now := score.details.get(KL_TOKENS))
    ]
    differences = (*_differences(run, wanted), *lengths)
    return Comparison(verdict, basis, files, kl, floor, scores, differences)


def _same_file(name: str, index: Mapping[str, Any], wanted: Reproduction) -> bool:
    file = wanted.files.get(name)
    return file is not None and index.get(name, {}).get("sha256") == file.sha256


def _saved(wanted: Reproduction, name: str, now: Score) -> Score | None:
    """What the file says; None where it says nothing, or of another number of positions."""
    scores = wanted.test_scores.get(name)
    if scores is None or _tokens(wanted, name, now) != now.details.get(KL_TOKENS):
        return None
    return scores.saved


def _tokens(wanted: Reproduction, name: str, now: Score) -> Any:
    """N of a score in the file; older files say it in their settings alone."""
    saved = wanted.test_scores[name].saved if name in wanted.test_scores else None
    if now.details.get(KL_TOKENS) is None or saved is None:
        return now.details.get(KL_TOKENS)
    return saved.details.get(KL_TOKENS) or wanted.kl_tokens_of(name)


def _as_near(then: Score | None, now: Score, floor: float) -> bool:
    """Whether two measurements of one score differ by at most the noise floor."""
    if then is None or then.value is None or now.value is None:
        return then is None or then.value == now.value
    return abs(then.value - now.value) <= floor


def _differences(run: RunParts, wanted: Reproduction) -> Iterator[Difference]:
    """Inputs, versions and machine that are not what they were; of prompts, each set."""
    now = _flat(portable(run.identity))
    for what, then in _flat(wanted.identity).items():
        if now.get(what) != then:
            yield Difference(what, _short(then), _short(now.get(what)))
    versions = installed_versions()
    for package, version in wanted.versions.items():
        if versions.get(package) != version:
            yield Difference(package, version, versions.get(package, "not installed"))
    if wanted.platform != machine():
        yield Difference("machine", wanted.platform, machine())


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested tables as one, `prompts.harmful.train` and so on."""
    entries: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            entries |= _flat(value, f"{above}{key}.")
        else:
            entries[f"{above}{key}"] = value
    return entries


def _short(value: Any) -> str:
    """A value for people: of a hash its beginning, nothing that a terminal would obey."""
    text = "".join(c if c.isprintable() else "?" for c in str(value))
    is_hash = len(text) >= 32 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_hash else text[:80]
