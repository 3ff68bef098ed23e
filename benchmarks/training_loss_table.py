"""The figures of benchmarks/training_loss.py over seeds, and its table. Measures nothing."""

from __future__ import annotations

import math
import statistics
from typing import Any


def per_pair(runs: list[dict[str, Any]], beta: float) -> list[float]:
    """Held-out main loss of each pair, mean over seeds."""
    return [
        statistics.fmean(values)
        for values in zip(*(r["main_losses"] for r in runs if r["beta_kl"] == beta), strict=True)
    ]


def summarize(runs: list[dict[str, Any]], before: dict[str, Any], beta: float) -> dict[str, Any]:
    """One row: means over seeds, and the main loss against beta 0, paired by prompt."""
    own = [r for r in runs if r["beta_kl"] == beta]
    mine, plain = per_pair(runs, beta), per_pair(runs, 0.0)
    differences = [a - b for a, b in zip(mine, plain, strict=True)]
    fall = before["main_loss"] - statistics.fmean(plain)

    def mean(name: str) -> float:
        return statistics.fmean(r[name] for r in own)

    return {
        "beta_kl": beta,
        "main_loss": mean("main_loss"),
        "main_loss_above_beta_0": statistics.fmean(differences),
        "main_loss_above_beta_0_standard_error": statistics.stdev(differences)
        / math.sqrt(len(differences)),
        "share_of_main_fall": (before["main_loss"] - mean("main_loss")) / fall,
        "benign_objective": mean("benign_objective"),
        "teacher_forced_kl": mean("teacher_forced_kl"),
        "teacher_forced_kl_standard_error": mean("teacher_forced_kl_standard_error"),
        "refusals": [r["refusals"] for r in own],
    }


def table(summary: list[dict[str, Any]], before: dict[str, Any], asked: int) -> list[str]:
    """The lines of the documentation's table."""
    lines = [
        "| `beta_kl` | main loss | above 0's | benign T² KL | KL over 8 tokens | refusals |",
        "|---|---|---|---|---|---|",
        f"| before | {before['main_loss']:.3f} | | 0 | 0 | {before['refusals']}/{asked} |",
    ]
    for row in summary:
        difference = f"{row['main_loss_above_beta_0']:+.3f} ± " + (
            f"{row['main_loss_above_beta_0_standard_error']:.3f}"
        )
        kl = f"{row['teacher_forced_kl']:.4f} ± {row['teacher_forced_kl_standard_error']:.4f}"
        counts = ", ".join(f"{count}/{asked}" for count in row["refusals"])
        lines.append(
            f"| {row['beta_kl']:g} | {row['main_loss']:.3f} | "
            f"{difference if row['beta_kl'] else ''} | "
            f"{row['benign_objective']:.4f} | {kl} | {counts} |"
        )
    return lines
