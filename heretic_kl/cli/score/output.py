"""What `heretic-kl score` measured, as tables and as JSON. Measures and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from heretic_kl.cli.score.chain_cells import chain_cells, chain_document, plain_pair
from heretic_kl.cli.score.detail_cells import (
    band_cells,
    bucket_cells,
    further_figures,
    worst_places,
)
from heretic_kl.cli.score.settings import (
    FIXED_BY_A_STORED_REFERENCE,
    UNUSED_OVER_TEXT,
    USED_OVER_TEXT,
    ScoreSettings,
    hub_dataset,
)
from heretic_kl.errors import HereticKLError
from heretic_kl.prompts import PANEL, PANEL_VERSION, Prompt, fingerprint

if TYPE_CHECKING:
    from heretic_kl.report import MeasurementReport
    from heretic_kl.score import (
        ChainMeasurement,
        Comparison,
        MeasuredOn,
        Measurement,
        TeacherForcedKL,
        TextKL,
    )
    from heretic_kl.score.llama.kld_rows import LlamaRows


@dataclass(frozen=True)
class Outcome:
    """What was measured, in the order of the candidates."""

    kl: TeacherForcedKL | TextKL
    measurements: Sequence[Measurement]
    failure: HereticKLError | None
    """Why a later candidate, and those after it, are not among them."""
    chain: ChainMeasurement | None = None

    def comparison(self, settings: ScoreSettings) -> Comparison:
        """The candidates that were measured, nearest to the reference first."""
        from heretic_kl.score import Comparison

        return Comparison.of(settings.candidate[: len(self.measurements)], self.measurements)


def report(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome
) -> MeasurementReport:
    """Return what the tables show."""
    from heretic_kl.report import MeasuredCandidate, MeasurementReport

    first, *_ = outcome.measurements
    floor = first.noise_floor
    name = settings.name
    if settings.stored and (stored := _reference_settings(outcome).get("model")) is not None:
        name = f"{name}, stored from {stored}"
    return MeasurementReport(
        reference=name,
        reference_dtype=first.reference_dtype,
        inputs=_inputs(settings, prompts, outcome),
        over_text=settings.over_text,
        ranking=outcome.comparison(settings).cells() if outcome.measurements[1:] else (),
        chain=() if outcome.chain is None else chain_cells(outcome.chain),
        rounding_floor=None if floor is None else floor.rounding,
        position_decay=first.position_decay,
        bands=band_cells(first),
        candidates=tuple(
            MeasuredCandidate(
                name,
                measurement.candidate_dtype,
                measurement.summary,
                None if measurement is first else measurement.compare(first),
                measurement.groups,
                measurement.macro_average,
                measurement.back_end_floor,
                _llama_cells(measurement.llama_rows),
                further_figures(measurement),
                bucket_cells(measurement),
                measurement.verdict,
                worst_places(measurement, settings.worst),
                measurement.known_tokens is not None,
            )
            for name, measurement in zip(settings.candidate, outcome.measurements, strict=False)
        ),
    )


def measured_on(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome
) -> MeasuredOn:
    """What all models read, as the hub is told it."""
    from heretic_kl.model import ModelSource
    from heretic_kl.score import MeasuredOn

    facts, shape = _reference_settings(outcome), outcome.kl.reference.mask.shape
    reference, source, dataset, split = settings.name, "stored prompts", None, None
    if settings.over_text:
        source = ", ".join(path.name for path in settings.text) or "text of base logits"
        dataset = hub_dataset(settings)
    elif prompts is not None:
        source, dataset, split = (
            settings.dataset.source,
            hub_dataset(settings),
            settings.dataset.split,
        )
    return MeasuredOn(
        reference=str(facts.get("model") or ModelSource(reference).short_name),
        source=_public_name(source, dataset),
        count=shape[0],
        sha256=str(facts.get("text") if settings.over_text else facts["prompts"]),
        positions=shape[1],
        dataset_id=dataset,
        split=split,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _public_name(source: str, dataset: str | None) -> str:
    """A source as others are told of it: no path of this machine."""
    if source == PANEL:
        return f"{source}, version {PANEL_VERSION}"
    local = not source.startswith("builtin:") and source != dataset
    return source.split("/")[-1] if local else source


def _inputs(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome
) -> tuple[tuple[str, str], ...]:
    """What all models read, as labels and lines for people."""
    reference = outcome.kl.reference
    sequences, positions = reference.mask.shape
    if settings.over_text:
        assert reference.prompts is not None
        context = settings.context if settings.text else reference.prompts.shape[1] + positions
        files = ", ".join(map(str, settings.text)) or "the tokens in the reference's file"
        windows = f"{sequences} of {context} tokens, the last {positions} of each scored"
        return (("text", files), ("windows", windows))
    count = f"{sequences} prompt{'s' if sequences > 1 else ''}"
    of = "the stored reference"
    if prompts is not None:
        of = replace(settings.dataset, limit=None).describe()
        if settings.dataset.source == PANEL:
            of += f", version {PANEL_VERSION} ({fingerprint(prompts)[:12]})"
    first = "first token" if positions == 1 else f"first {positions} tokens"
    responses = _reference_settings(outcome)["responses"]
    return (
        ("prompts", f"{count} of {of}"),
        ("responses", f"{responses}, of the reference; {first} of each"),
    )


def _llama_cells(figures: LlamaRows | None) -> tuple[tuple[str, ...], ...]:
    """llama.cpp's rows and ours, as cells."""
    if figures is None:
        return ()

    def cell(value: float, error: float | None) -> str:
        return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"

    return (
        ("", "llama.cpp", "ours"),
        *(
            (row.name, cell(row.llama, row.llama_error), cell(row.ours, row.ours_error))
            for row in figures.rows
        ),
        ("clipped by the file", "", f"{figures.clipped_mass:.2g} of the probability"),
    )


def json_text(settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome) -> str:
    """Everything the tables show and what is needed to measure it again."""
    from heretic_kl.export import installed_versions, machine
    from heretic_kl.kl import METRIC_VERSION

    first, *_ = outcome.measurements
    stored_settings = _reference_settings(outcome)
    candidates = []
    for name, measurement in zip(settings.candidate, outcome.measurements, strict=False):
        paired = None if measurement is first else plain_pair(measurement.compare(first))
        figures = measurement.to_dict(worst=settings.worst)
        candidates.append({"name": name, **figures, "against_first": paired})
    document = {
        "command": "heretic-kl score",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "metric_version": METRIC_VERSION,
        "versions": installed_versions(),
        "machine": machine(),
        "reference": {
            "name": settings.name,
            "stored": settings.stored or settings.base_logits,
            "model": stored_settings.get("model"),
            "dtype": first.reference_dtype,
            "tokenizer_hash": outcome.kl.reference.identity.tokenizer_hash,
        },
        **_described_inputs(settings, prompts, outcome),
        "divergence": first.summary.divergence,
        "temperature": first.summary.temperature,
        "position_decay": first.position_decay,
        "settings": _plain_settings(settings),
        "candidates": candidates,
        "ranking": outcome.comparison(settings).records(),
        "chain": None
        if outcome.chain is None
        else chain_document(outcome.chain, (settings.name, *settings.candidate)),
        "failure": None if outcome.failure is None else str(outcome.failure),
    }
    return to_json(document, indent=2, inf_nan_mode="null", fallback=dict).decode() + "\n"


def _described_inputs(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome
) -> dict[str, Any]:
    """What all models read, by source and hash."""
    facts = _reference_settings(outcome)
    sequences, positions = outcome.kl.reference.mask.shape
    if settings.over_text:
        text = {"files": [str(path) for path in settings.text], "sha256": facts["text"]}
        return {"text": {**text, "windows": sequences, "scored": outcome.kl.reference.rows}}
    return {
        "prompts": {
            "source": settings.dataset.describe() if prompts is not None else None,
            "count": sequences,
            "version": PANEL_VERSION
            if prompts is not None and settings.dataset.source == PANEL
            else None,
            "sha256": facts["prompts"] if prompts is None else fingerprint(prompts),
        },
        "kl_tokens": positions,
        "response": facts["responses"],
    }


def _plain_settings(settings: ScoreSettings) -> dict[str, Any]:
    """The settings in force; of a stored reference only those that still had a say."""
    left_out = {"reference", "candidate", "chain", "response", "quiet", "debug", "prompts"}
    left_out |= {*UNUSED_OVER_TEXT} if settings.over_text else {"text", *USED_OVER_TEXT}
    if settings.stored:
        left_out |= {*FIXED_BY_A_STORED_REFERENCE}
    if settings.stored or settings.over_text:
        return settings.model_dump(mode="json", exclude=left_out)
    return {
        **settings.model_dump(mode="json", exclude=left_out),
        "prompts": asdict(settings.dataset),
    }


def _reference_settings(outcome: Outcome) -> Mapping[str, Any]:
    """What the reference remembers of how it was made."""
    return outcome.kl.reference.identity.settings
