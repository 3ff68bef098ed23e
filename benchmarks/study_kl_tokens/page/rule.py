"""What the figures recommend: N and weights by the plan's rule, and numbers of prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study_kl_tokens.variants import MAIN, OPERATORS, USEFUL

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
CLOSE = 0.01
"""Correlations nearer than this count as equal where cost is weighed."""
STATED_ERROR = 0.1
"""Standard error of a KL that is stated, as a share of it."""
Model = Mapping[str, Any]


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
    def measures_better(self) -> bool:
        """Whether the conditions of the plan hold that are not about what a search picks."""
        return self.gain["low"] > 0 and all(value >= 0 for value in self.others.values())

    @property
    def met(self) -> bool:
        """Whether all conditions of the plan hold."""
        return self.measures_better and self.regret is not None and self.regret <= 0


def checks(models: Sequence[Model]) -> list[Check]:
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


def recommended(models: Sequence[Model]) -> Check | None:
    """The candidate with the largest gain of those that meet the rule; None: keep the default."""
    met = [check for check in checks(models) if check.met]
    return max(met, key=lambda check: check.gain["value"], default=None)


@dataclass(frozen=True)
class Recommended:
    """The settings that follow from the figures."""

    kind: str
    """Of KL; says the weights."""
    search_tokens: int
    """N of a search, by all conditions of the plan."""
    score_tokens: int
    """N of a model that is measured by itself: nothing is picked by it, so regret does not count.
    The smallest N of the same kind that is not below the search's and measures better, if any."""
    rank_prompts: int
    """Fewest prompts that rank edits as well as the most of the study, at the search's N."""
    state_prompts: int
    """Prompts from which a KL has a standard error of `STATED_ERROR` of it, on every model."""


def recommendation(models: Sequence[Model]) -> Recommended:
    """N, weights and numbers of prompts; the latter are the most that any model asks for."""
    best = recommended(models)
    kind, tokens = (best.kind, best.tokens) if best else DEFAULT
    better = [
        check.tokens
        for check in checks(models)
        if check.kind == kind and check.tokens > tokens and check.measures_better
    ]
    return Recommended(
        kind,
        tokens,
        min(better, default=tokens),
        max(prompts_to_rank(model, tokens) for model in models),
        max(prompts_to_state(model, tokens) for model in models),
    )


def prompts_to_rank(model: Model, tokens: int) -> int:
    """Fewest measured prompts whose correlation with damage is as high as that of the most."""
    cells = [cell for cell in model["precision"]["cells"] if cell["tokens"] == tokens]
    most = max(cells, key=lambda cell: int(cell["prompts"]))
    enough = [c["prompts"] for c in cells if c["spearman"] >= most["spearman"] - CLOSE]
    return int(min(enough))


def prompts_to_state(model: Model, tokens: int, error: float = STATED_ERROR) -> int:
    """Prompts from which the median standard error of a KL is that share of it.

    Extrapolated from the most prompts measured: the error falls with the root of their number.
    """
    cells = [cell for cell in model["precision"]["cells"] if cell["tokens"] == tokens]
    most = max(cells, key=lambda cell: int(cell["prompts"]))
    return math.ceil(most["prompts"] * (most["relative_error"] / error) ** 2)


@dataclass(frozen=True)
class Finding:
    """One statement about the main KL, as every model has it."""

    text: str
    figures: Sequence[Mapping[str, float] | None]
    """An interval a model, in their order; None: too few edits."""
    chance: float = 0.0

    @property
    def holds(self) -> list[bool]:
        """Of each model, whether its interval is above chance."""
        return [bool(figures and figures["low"] > self.chance) for figures in self.figures]


def gain_text(tokens: int, group: str) -> str:
    """The finding that N gains over the first token, over a group of edits."""
    return f"gain of N = {tokens} over N = 1 ({group})"


def findings(models: Sequence[Model]) -> list[Finding]:
    """The main comparisons, model by model."""
    made = []
    for tokens in (3, 16):
        for name in (USEFUL, OPERATORS, "all edits"):
            # Without refusals the useful edits are all ablations and learned ones.
            groups = [
                None if name == USEFUL and model["regret"] is None else model["groups"][name]
                for model in models
            ]
            gains = [g and g["more_than_first"][str(tokens)]["composite"] for g in groups]
            made.append(Finding(gain_text(tokens, name), gains))
    for tokens in (3, 16):
        text = f"N = {tokens} orders pairs that N = 1 cannot tell apart ({OPERATORS})"
        shares = [model["ties"][OPERATORS]["right"][str(tokens)] for model in models]
        made.append(Finding(text, shares, 0.5))
    return made


def cheapest(model: Model) -> Mapping[str, float]:
    """Prompts and positions of least cost whose correlation is as high as the highest."""
    cells: list[Mapping[str, float]] = model["precision"]["cells"]
    best = max(cell["spearman"] for cell in cells)
    return min(
        (cell for cell in cells if cell["spearman"] >= best - CLOSE), key=lambda c: c["seconds"]
    )
