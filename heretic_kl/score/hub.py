"""A measurement as files that the Hugging Face hub reads. Reads no file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from heretic_kl._version import __version__
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import METRIC_VERSION
from heretic_kl.score.comparison import MeasuresCandidates
from heretic_kl.score.measurement import Measurement

TASK: Final = "teacher_forced_kl"
"""What the measurement is called among tasks and metrics."""


@dataclass(frozen=True)
class MeasuredOn:
    """What all models read, fit to be shown to others."""

    reference: str
    source: str
    """Prompts or text, as the user named them."""
    count: int
    """Prompts or windows."""
    sha256: str
    positions: int
    """N, most scored positions of each."""
    dataset_id: str | None = None
    """On the hub; None: the source is not there."""
    split: str | None = None
    date: str | None = None


def card_metadata(name: str, measurement: Measurement, on: MeasuredOn) -> str:
    """Front matter for the card of a candidate, with the KL as `model-index`.

    Args:
        name: of the candidate.
        measurement: of it.
        on: what it was measured on.
    """
    from huggingface_hub import EvalResult, ModelCardData

    arguments = {
        "unit": "nats",
        "divergence": measurement.summary.divergence,
        "reference": on.reference,
        "positions": on.positions,
        "metric_version": METRIC_VERSION,
        "heretic_kl": __version__,
        **_uncertainty(measurement),
    }
    result = EvalResult(
        task_type="text-generation",
        dataset_type=on.dataset_id or "own",
        dataset_name=f"{on.count} of {on.source}",
        dataset_split=on.split,
        dataset_args={"count": on.count, "sha256": on.sha256},
        metric_type=TASK,
        metric_value=measurement.kl,
        metric_name=f"KL({on.reference} || this model): {measurement.verdict}",
        metric_args={key: value for key, value in arguments.items() if value is not None},
    )
    data = ModelCardData(model_name=name, eval_results=[result])
    return f"---\n{data.to_yaml()}\n---\n"


def evaluation_results(measurement: Measurement, on: MeasuredOn) -> str:
    """A file for `.eval_results/` in a model's repository, as YAML.

    Raises:
        MeasurementError: the source is no dataset of the hub, or huggingface_hub is too old.
    """
    import yaml

    try:
        from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    except ImportError:
        raise MeasurementError(
            "this huggingface_hub does not know evaluation-results files: upgrade it"
        ) from None
    if on.dataset_id is None:
        raise MeasurementError(f"{on.source!r} is no dataset of the hub, which such a file names")
    error = _uncertainty(measurement)["standard_error"]
    within = "" if error is None else f" ± {error:.2g}"
    apart = measurement.back_end_floor
    over_text = measurement.table.clusters is not None
    units, part = ("windows", "last") if over_text else ("responses", "first")
    floor = "" if apart is None else f", floor across back ends {apart:.2g}"
    entry = EvalResultEntry(
        dataset_id=on.dataset_id,
        task_id=TASK,
        value=measurement.kl,
        date=on.date,
        notes=f"KL({on.reference} || this model){within} nats{floor}, {part} "
        f"{on.positions} positions of {on.count} {units}, heretic-kl {__version__}",
    )
    return str(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False))


def merged_with_lm_eval(
    results: Mapping[str, Any], measurement: Measurement, on: MeasuredOn
) -> dict[str, Any]:
    """The measurement as one more task of a results file of lm-evaluation-harness.

    Args:
        results: of the harness, unchanged; {}: there are none.
        measurement: of the same model.
        on: what it was measured on.

    Raises:
        MeasurementError: `results` are none of the harness, or have this task already.
    """
    merged: dict[str, Any] = copy.deepcopy(dict(results))
    if results and not isinstance(merged.get("results"), dict):
        raise MeasurementError('these are no results of lm-evaluation-harness: no table "results"')
    if TASK in merged.get("results", {}):
        raise MeasurementError(f"the results have a task {TASK!r} already")
    error, change = measurement.summary.standard_error, measurement.change
    figures = {
        "alias": TASK,
        "kl,none": measurement.kl,
        "kl_stderr,none": "N/A" if error is None else error,
        "same_top_token,none": measurement.summary.top1_agreement,
        "gain,none": change.gain.mean,
        "loss,none": change.loss.mean,
    }
    config = {
        "task": TASK,
        "metadata": {
            "reference": on.reference,
            "source": on.source,
            "sha256": on.sha256,
            "positions": on.positions,
            "heretic_kl": __version__,
            "verdict": measurement.verdict,
            **_uncertainty(measurement),
        },
    }
    better = {"kl": False, "same_top_token": True, "gain": True, "loss": False}
    for table, entry in (
        ("results", figures),
        ("configs", config),
        ("versions", METRIC_VERSION),
        ("n-shot", 0),
        ("n-samples", {"original": on.count, "effective": on.count}),
        ("higher_is_better", better),
    ):
        merged.setdefault(table, {})[TASK] = entry
    return merged


class KLMetric:
    """A KL as `evaluate` has metrics, for users of lm-evaluation-harness, too.

        KLMetric(TeacherForcedKL("path/to/original")).compute(model="path/to/fine-tune")

    Args:
        kl: of the reference.
        source: prompts or text, as others are told of them.
    """

    name: Final = TASK

    def __init__(self, kl: MeasuresCandidates, source: str = "own prompts") -> None:
        self._kl, self._source = kl, source

    @property
    def measured_on(self) -> MeasuredOn:
        """What all models read."""
        facts, shape = self._kl.reference.identity.settings, self._kl.reference.mask.shape
        sha256 = str(facts["text"] if "text" in facts else facts["prompts"])
        name = str(facts.get("model") or "the reference")
        return MeasuredOn(name, self._source, shape[0], sha256, shape[1])

    def compute(self, *, model: Any, lm_eval: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Measure a model; plain figures by name, nats.

        Args:
            model: as for `TeacherForcedKL.score`.
            lm_eval: results of lm-evaluation-harness for it, returned with these figures as
                one more task.

        Raises:
            HereticKLError: as `score` and `merged_with_lm_eval`.
        """
        measurement = self._kl.score(model)
        if lm_eval is not None:
            return merged_with_lm_eval(lm_eval, measurement, self.measured_on)
        change = measurement.change
        return {
            "kl": measurement.kl,
            **_uncertainty(measurement),
            "same_top_token": measurement.summary.top1_agreement,
            "gain": change.gain.mean,
            "loss": change.loss.mean,
            "verdict": measurement.verdict,
        }


def _uncertainty(measurement: Measurement) -> dict[str, Any]:
    if measurement.known_tokens is not None:
        raise MeasurementError(f"this is no KL for the hub: {measurement.verdict}")
    summary = measurement.summary
    return {
        "standard_error": summary.standard_error,
        "interval_95": None if summary.interval is None else list(summary.interval),
        "noise_floor": summary.noise_floor,
        "back_end_floor": measurement.back_end_floor,
    }
