"""What `heretic-kl score` measurement, as tables and as JSON. Measures and writes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from heretic_kl.cli.score.settings import FIXED_BY_A_STORED_REFERENCE, ScoreSettings
from heretic_kl.errors import HereticKLError
from heretic_kl.prompts import Prompt, fingerprint

if TYPE_CHECKING:
    from heretic_kl.report import MeasurementReport
    from heretic_kl.score import Measurement, TeacherForcedKL


@dataclass(frozen=True)
class Outcome:
    """What was measured, in the order of the candidates."""

    kl: TeacherForcedKL
    measurements: Sequence[Measurement]
    failure: HereticKLError | None
    """Why a later candidate, and those after it, are not among them."""


def report(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome
) -> MeasurementReport:
    """Return what the tables show."""
    from heretic_kl.report import MeasuredCandidate, MeasurementReport

    first, *_ = outcome.measurements
    floor = first.noise_floor
    count = f"{outcome.kl.prompts} prompt{'s' if outcome.kl.prompts > 1 else ''}"
    of = "the stored reference"
    if prompts is not None:
        of = replace(settings.dataset, limit=None).describe()
    name = settings.name
    if settings.stored and (stored := _reference_settings(outcome).get("model")) is not None:
        name = f"{name}, stored from {stored}"
    return MeasurementReport(
        reference=name,
        reference_dtype=first.reference_dtype,
        responses=str(_reference_settings(outcome)["responses"]),
        prompts=f"{count} of {of}",
        positions=outcome.kl.kl_tokens,
        rounding_floor=None if floor is None else floor.rounding,
        position_decay=first.position_decay,
        candidates=tuple(
            MeasuredCandidate(
                name,
                measurement.candidate_dtype,
                measurement.summary,
                None if measurement is first else measurement.compare(first),
            )
            for name, measurement in zip(settings.candidate, outcome.measurements, strict=False)
        ),
    )


def json_text(settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome) -> str:
    """Everything the tables show and what is needed to measure it again."""
    from heretic_kl.export import installed_versions, machine
    from heretic_kl.kl import METRIC_VERSION

    first, *_ = outcome.measurements
    stored_settings = _reference_settings(outcome)
    stored = prompts is None
    candidates = []
    for name, measurement in zip(settings.candidate, outcome.measurements, strict=False):
        paired = None if measurement is first else _plain_pair(measurement.compare(first))
        candidates.append({"name": name, **measurement.to_dict(), "against_first": paired})
    document = {
        "command": "heretic-kl score",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "metric_version": METRIC_VERSION,
        "versions": installed_versions(),
        "machine": machine(),
        "reference": {
            "name": settings.name,
            "stored": stored,
            "model": stored_settings.get("model"),
            "dtype": first.reference_dtype,
            "tokenizer_hash": outcome.kl.reference.identity.tokenizer_hash,
        },
        "prompts": {
            "source": None if stored else settings.dataset.describe(),
            "count": outcome.kl.prompts,
            "sha256": stored_settings["prompts"] if prompts is None else fingerprint(prompts),
        },
        "kl_tokens": outcome.kl.kl_tokens,
        "response": stored_settings["responses"],
        "divergence": outcome.kl.divergence,
        "temperature": outcome.kl.temperature,
        "position_decay": outcome.kl.position_decay,
        "settings": _plain_settings(settings),
        "candidates": candidates,
        "failure": None if outcome.failure is None else str(outcome.failure),
    }
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _plain_pair(pair: Any) -> dict[str, Any]:
    interval = None if pair.interval is None else pair.interval._asdict()
    return {**pair._asdict(), "interval": interval}


def _plain_settings(settings: ScoreSettings) -> dict[str, Any]:
    """The settings in force; of a stored reference only those that still had a say."""
    left_out = {"reference", "candidate", "response", "quiet", "debug", "prompts"}
    if settings.stored:
        return settings.model_dump(mode="json", exclude={*left_out, *FIXED_BY_A_STORED_REFERENCE})
    return {
        **settings.model_dump(mode="json", exclude=left_out),
        "prompts": asdict(settings.dataset),
    }


def _reference_settings(outcome: Outcome) -> Mapping[str, Any]:
    """What the reference remembers of how it was made."""
    return outcome.kl.reference.identity.settings


def _finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
