"""What a measurement tells beside its mean, as cells of tables. Measures nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heretic_kl.kl import MeanEstimate
    from heretic_kl.report import DetailSection
    from heretic_kl.score import Measurement

Rows = tuple[tuple[str, str], ...]


def further_figures(measurement: Measurement) -> Rows:
    """Gain and loss, the split, thoughts and answers: labels and cells."""
    change, split = measurement.change, measurement.split
    rows = [
        ("gain in log p(token)", f"{_estimate(change.gain)} ({change.better:.0%})"),
        ("loss in log p(token)", f"{_estimate(change.loss)} ({change.worse:.0%})"),
    ]
    if split is not None:
        refuses = f"{split.reference_refuses:.2g} -> {split.candidate_refuses:.2g}"
        rows += [
            ("KL of refusing or not", _estimate(split.behaviour)),
            ("KL of everything else", _estimate(split.remainder)),
            ("p(refusal begins)", refuses),
        ]
    known_tokens = measurement.known_tokens
    if known_tokens is not None:
        rests = f"{known_tokens.reference_rest:.2g} -> {known_tokens.candidate_rest:.2g}"
        rows.append((f"p(not in the top {known_tokens.top})", rests))
    for part in measurement.parts:
        error = "" if part.standard_error is None else f" ± {part.standard_error:.2g}"
        rows.append((f"KL, {part.name}", f"{part.kl:.4g}{error} ({part.positions})"))
    return tuple(rows)


def bucket_cells(measurement: Measurement) -> Rows:
    """How the reference tokens' probability changed, by how sure the reference is."""
    rows = []
    for bucket in measurement.change.buckets:
        error = "" if bucket.standard_error is None else f" ± {bucket.standard_error:.2g}"
        cell = f"{bucket.change:+.3g}{error} ({bucket.positions})"
        rows.append((f"{bucket.low:g} to {bucket.high:g}", cell))
    return tuple(rows)


def band_cells(measurement: Measurement) -> Rows:
    """What rounding the reference's own weights costs; nothing where it was not measured."""
    from heretic_kl.model.rounding import BLOCK

    rows = []
    for band in measurement.bands:
        error = "" if band.standard_error is None else f" ± {band.standard_error:.2g}"
        rows.append((f"{band.bits} bits, blocks of {BLOCK}", f"{band.kl:.4g}{error}"))
    return tuple(rows)


def worst_places(measurement: Measurement, count: int) -> tuple[DetailSection, ...]:
    """The worst prompts and positions; no line wider than 80 columns."""
    from heretic_kl.report import DetailSection

    if not count:
        return ()
    prompts = [
        (f"{place.prompt}", f"{place.kl:.3g}", f"({place.positions})", _first(place.text, 54))
        for place in measurement.worst_prompts(count)
    ]
    positions = [
        (
            f"{place.prompt}:{place.position}",
            f"{place.kl:.3g}",
            f"{place.reference_probability:.2g} -> {place.candidate_probability:.2g}",
            f"{_first(place.token, 10)!r}, not {_first(place.candidate_token, 10)!r}"
            if place.token != place.candidate_token
            else f"{_first(place.token, 10)!r}",
            _last(place.before, 16),
        )
        for place in measurement.worst_positions(count)
    ]
    headings = ("place", "KL", "p(token)", "token, candidate's best", "after")
    return (
        DetailSection("Worst prompts", (("prompt", "KL", "", ""), *prompts)),
        DetailSection("Worst positions", (headings, *positions)),
    )


def _first(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _last(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"…{line[1 - most :]}"


def _estimate(estimate: MeanEstimate) -> str:
    error = estimate.standard_error
    return f"{estimate.mean:.4g}" if error is None else f"{estimate.mean:.4g} ± {error:.2g}"
