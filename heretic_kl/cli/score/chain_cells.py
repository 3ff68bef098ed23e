"""Chains as cells of tables and as JSON. Measures nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heretic_kl.kl import PairedComparison
    from heretic_kl.score import ChainMeasurement

Cells = tuple[tuple[str, ...], ...]


def chain_cells(chain: ChainMeasurement) -> Cells:
    """A line for each pair, and what the steps come to together."""
    lines: list[tuple[str, ...]] = [("", "from", "to", "KL", "95% interval")]
    floors = [pair.measurement.back_end_floor for pair in chain.pairs]
    across = any(floor is not None for floor in floors)
    if across:
        lines[0] = (*lines[0], "back-end floor")
    for pair, floor in zip(chain.pairs, floors, strict=True):
        summary = pair.measurement.summary
        between = summary.interval
        lines.append(
            (
                "step" if pair.is_step else "",
                _place(pair.earlier) + ", as float16" * pair.rounded,
                _place(pair.later),
                _with_error(summary.mean, summary.standard_error),
                "–" if between is None else f"{between.low:.3g} to {between.high:.3g}",
                *(("–" if floor is None else f"{floor:.2g}",) if across else ()),
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


def _place(number: int) -> str:
    return "original" if number == 0 else f"candidate {number}"


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    text = f"{value:{sign}.3g}"
    return text if error is None else f"{text} ± {error:.2g}"
