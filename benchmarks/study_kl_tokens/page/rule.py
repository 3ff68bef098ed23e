"""The plan's rule for recommending another default, applied to the figures. Draws nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study_kl_tokens.variants import MAIN

DEFAULT = (MAIN, 3)
CANDIDATES = (
    (MAIN, 1),
    (MAIN, 5),
    (MAIN, 8),
    (MAIN, 16),
    (MAIN, 32),
    (MAIN, 64),
    ("greedy forward geometric mean", 16),
)
USEFUL, OPERATORS = "useful", "ablations and learned"
CLOSE = 0.01
"""Correlations nearer than this count as equal where cost is weighed."""


@dataclass(frozen=True)
class Check:
    """Whether one candidate may replace the default, and what speaks for and against it."""

    kind: str
    tokens: int
    gain: Mapping[str, float]
    """Correlation with the composite over the default's: demo model, useful edits."""
    others: Mapping[str, float]
    """The same point estimate of every other model, ablations and learned edits."""
    regret: float | None
    """Mean regret less the default's."""

    @property
    def met(self) -> bool:
        """Whether all conditions of the plan hold."""
        agree = all(value >= 0 for value in self.others.values())
        return self.gain["low"] > 0 and agree and (self.regret is not None and self.regret <= 0)


def checks(models: Sequence[Mapping[str, Any]]) -> list[Check]:
    """The rule applied to every candidate; none where the first model has too few useful edits."""
    demo, *others = models
    useful = demo["groups"][USEFUL]
    if useful is None:
        return []
    made = []
    for kind, tokens in CANDIDATES:
        key = f"{kind}, {tokens}"
        regret = None
        if demo["regret"]:
            picks = demo["regret"]["picks"]
            default = picks[f"{DEFAULT[0]}, {DEFAULT[1]}"]["mean_regret"]
            regret = round(picks[key]["mean_regret"] - default, 4)
        points = {
            model["model"]: model["groups"][OPERATORS]["more_than_three"][key]["value"]
            for model in others
            if model["groups"][OPERATORS]
        }
        made.append(Check(kind, tokens, useful["more_than_three"][key], points, regret))
    return made


def recommended(models: Sequence[Mapping[str, Any]]) -> Check | None:
    """The candidate with the largest gain of those that meet the rule; None: keep the default."""
    met = [check for check in checks(models) if check.met]
    return max(met, key=lambda check: check.gain["value"], default=None)


def cheapest(model: Mapping[str, Any]) -> Mapping[str, float]:
    """Prompts and positions of least cost whose correlation is as high as the highest."""
    cells: list[Mapping[str, float]] = model["precision"]["cells"]
    best = max(cell["spearman"] for cell in cells)
    return min(
        (cell for cell in cells if cell["spearman"] >= best - CLOSE), key=lambda c: c["seconds"]
    )
