"""Rankings and chains as cells of tables, CSV and Markdown. Measures nothing."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heretic_kl.kl import PairedComparison
    from heretic_kl.score import ChainMeasurement, RankedCandidate

COLUMNS = ("group", "candidate", "size MB", "bits/weight", "KL, nats", "beyond the best")
Cells = tuple[tuple[str, ...], ...]


def ranking_cells(ranked: Sequence[RankedCandidate]) -> Cells:
    """A heading and a line for each candidate."""
    return (COLUMNS, *(_line(candidate) for candidate in ranked))


def ranking_text(ranked: Sequence[RankedCandidate], path: Path) -> str:
    """The ranking as a file holds it: a Markdown table, or CSV with plain numbers."""
    if path.suffix.lower() == ".md":
        lines = [_line(candidate) for candidate in ranked]
        rows = [COLUMNS, ("---",) * len(COLUMNS), *lines]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ("group", "candidate", "bytes", "bits_per_weight", "kl", "standard_error", "low", "high")
        + ("same_top_token", "beyond_best", "beyond_best_error", "distinguishable", "dtype")
    )
    writer.writerows(_numbers(candidate) for candidate in ranked)
    return buffer.getvalue()


def chain_cells(chain: ChainMeasurement) -> Cells:
    """A line for each pair, and what the steps come to together."""
    lines: list[tuple[str, ...]] = [("", "from", "to", "KL", "95% interval")]
    for pair in chain.pairs:
        summary = pair.measurement.summary
        between = summary.interval
        lines.append(
            (
                "step" if pair.is_step else "",
                _place(pair.earlier),
                _place(pair.later),
                _with_error(summary.mean, summary.standard_error),
                "–" if between is None else f"{between.low:.3g} to {between.high:.3g}",
            )
        )
    beyond = chain.beyond_the_steps()
    verdict = "costs do not add" if beyond.distinguishable else "not distinguishable from 0"
    lines.append(("steps together", "", "", f"{chain.sum_of_steps:.4g}", ""))
    whole = _with_error(beyond.mean_difference, beyond.standard_error, "+")
    lines.append(("whole minus steps", "", "", whole, verdict))
    return tuple(lines)


def chain_document(chain: ChainMeasurement, names: Sequence[str]) -> dict[str, Any]:
    """The chain, JSON-ready."""
    return {
        "models": list(names),
        "pairs": [
            {"from": pair.earlier, "to": pair.later, **pair.measurement.to_dict()}
            for pair in chain.pairs
        ],
        "sum_of_steps": chain.sum_of_steps,
        "beyond_the_steps": plain_pair(chain.beyond_the_steps()),
    }


def plain_pair(pair: PairedComparison) -> dict[str, Any]:
    """A comparison, JSON-ready."""
    interval = None if pair.interval is None else pair.interval._asdict()
    return {**pair._asdict(), "interval": interval}


def _line(candidate: RankedCandidate) -> tuple[str, ...]:
    summary, size, beyond = candidate.measurement.summary, candidate.size, candidate.beyond_best
    difference = "–"
    if beyond is not None:
        difference = _with_error(beyond.mean_difference, beyond.standard_error, "+")
    bits = None if size is None else size.bits_per_weight
    return (
        candidate.group,
        Path(candidate.name).name or candidate.name,
        "–" if size is None else f"{size.file_bytes / 1e6:.1f}",
        "–" if bits is None else f"{bits:.2f}",
        _with_error(summary.mean, summary.standard_error),
        difference,
    )


def _numbers(candidate: RankedCandidate) -> tuple[object, ...]:
    summary, size, beyond = candidate.measurement.summary, candidate.size, candidate.beyond_best
    interval = (None, None) if summary.interval is None else summary.interval
    return (
        candidate.group,
        candidate.name,
        None if size is None else size.file_bytes,
        None if size is None else size.bits_per_weight,
        summary.mean,
        summary.standard_error,
        *interval,
        summary.top1_agreement,
        None if beyond is None else beyond.mean_difference,
        None if beyond is None else beyond.standard_error,
        None if beyond is None else beyond.distinguishable,
        candidate.measurement.candidate_dtype,
    )


def _place(number: int) -> str:
    return "original" if number == 0 else f"candidate {number}"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.3g}"
    return text if error is None else f"{text} ± {error:.2g}"
