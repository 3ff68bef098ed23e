"""The picked point on prompts that it was not picked by, against what the tool measured of it.

A KL is compared over as many positions as the tool's own. Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.search_quality.figures import wilson
from benchmarks.search_quality.results import Choice


@dataclass(frozen=True)
class Held:
    """How runs' validation figures hold elsewhere; each list has a value a run that tells it."""

    test_ratios: list[float]
    """KL on the tool's own test prompts over its validation KL."""
    judged_ratios: list[float]
    """KL on the judge's unseen prompts over its validation KL."""
    test_inside: list[bool]
    """Whether the rate of refusals on test prompts is in the 95% interval of validation."""
    judged_inside: list[bool]


def held(choices: Sequence[Choice]) -> Held:
    """Of one choice a run."""
    made = Held([], [], [], [])
    for choice in choices:
        trial, judged = choice["trial"], choice["judged"]
        if not trial or not judged:
            continue
        tested = trial.get("test_scores") or {}
        low, high = wilson(trial["refusals"], trial["n_harmful"])
        harmful = judged["candidate"]["harmful"]
        made.judged_inside.append(low <= harmful["refusals"] / harmful["n"] <= high)
        if "refusals" in tested:
            made.test_inside.append(low <= tested["refusals"]["value"] <= high)
        if "teacher_forced_kl" in tested and trial["kl"] > 0:
            made.test_ratios.append(tested["teacher_forced_kl"]["value"] / trial["kl"])
        same = judged_kl(judged, trial.get("kl_tokens"))
        if same is not None and trial["kl"] > 0:
            made.judged_ratios.append(same / trial["kl"])
    return made


def judged_kl(judged: dict[str, Any], kl_tokens: int | None) -> float | None:
    """The judge's KL over so many positions; None where it was not measured so."""
    by_length = judged.get("kl_by_length", [])
    if kl_tokens is None or kl_tokens > len(by_length):
        return None
    return float(by_length[kl_tokens - 1])


def cells(of: Held) -> list[str]:
    """Medians, and how many of how many; empty where no run tells."""
    ratios = [f"{median(r):.2f}" if r else "" for r in (of.test_ratios, of.judged_ratios)]
    counts = [f"{sum(i)} of {len(i)}" if i else "" for i in (of.test_inside, of.judged_inside)]
    return [*ratios, *counts]


HEAD = [
    "KL, test / validation",
    "KL, unseen / validation",
    "test refusals in the interval",
    "unseen refusals in the interval",
]
