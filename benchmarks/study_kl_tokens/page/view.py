"""Words and numbers for the page, read from the figures. Computes nothing that is stated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.study_kl_tokens.edits import ABLATIONS, LEARNED
from benchmarks.study_kl_tokens.task import POSITIONS
from benchmarks.study_kl_tokens.variants import COMPOSITE, MAIN, MEASURES, OPERATORS, USEFUL

SHOWN = (1, 3, 8, 16, 64)
MODEL_TITLES = {"qwen05": "Qwen2.5-Coder-0.5B"}
"""Name of a results file -> the model's, where they differ."""
TITLES = {
    MAIN: "greedy, forward, uniform, mean (the default)",
    "greedy forward geometric mean": "geometric weights",
    "greedy forward uniform median": "median over prompts",
    "greedy forward uniform confident": "positions where the reference is sure (0.9 or more)",
    "greedy forward uniform unsure": "the other positions",
    "greedy reverse uniform mean": "reverse",
    "greedy jensen_shannon uniform mean": "Jensen-Shannon",
    "sampled forward uniform mean": "sampled response",
    "sampled reverse uniform mean": "sampled response, reverse",
    "sampled jensen_shannon uniform mean": "sampled response, Jensen-Shannon",
    "paired: same prefix": "few prompts, same prefix",
    "free-running": "the same prompts, free-running",
}
"""Kind of a variant -> its row in the table."""


def model_title(name: str) -> str:
    """What a model is called on the page and in figures."""
    return MODEL_TITLES.get(name, name)


def interval(figures: Mapping[str, float] | None, digits: int = 2, sign: bool = False) -> str:
    """`0.93 (0.90 to 0.95)`; a dash where nothing is stated."""
    if figures is None:
        return "-"
    plus = "+" if sign else ""
    value, low, high = (f"{figures[key]:{plus}.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


class View:
    """One model's figures for the page."""

    def __init__(self, figures: Mapping[str, Any]) -> None:
        self.figures = figures

    def __getattr__(self, name: str) -> Any:
        return self.figures[name]

    @property
    def title(self) -> str:
        """The model's name."""
        return model_title(self.figures["model"])

    @property
    def useful(self) -> int | None:
        """How many edits are useful; None where there is no such group."""
        group = self.figures["groups"][USEFUL]
        return group["edits"] if group and self.figures["regret"] else None

    @property
    def kinds(self) -> list[str]:
        """Of all variants, in their order."""
        group = self.figures["groups"][OPERATORS]
        return list(dict.fromkeys(key.rpartition(", ")[0] for key in group["spearman"]))

    def by_measure(self, kind: str, tokens: int) -> list[float] | None:
        """Correlation of a variant with the composite and each measure; None: no such N."""
        figures = self.figures["groups"][OPERATORS]["spearman"].get(f"{kind}, {tokens}")
        return figures and [figures[name]["value"] for name in ("composite", *MEASURES)]

    @property
    def groups_with_figures(self) -> dict[str, Any]:
        """Those that have enough edits."""
        return {name: group for name, group in self.figures["groups"].items() if group}

    def correlation(
        self, group: str, tokens: int, kind: str = MAIN, measure: str = "composite"
    ) -> str:
        """Spearman's with its interval."""
        chosen = self.figures["groups"][group]
        return interval(chosen and chosen["spearman"][f"{kind}, {tokens}"][measure])

    def more_than_first(self, group: str, tokens: int, measure: str = "composite") -> str:
        """Gain in correlation over N = 1."""
        chosen = self.figures["groups"][group]
        return interval(chosen and chosen["more_than_first"][str(tokens)][measure], 3, sign=True)

    def more_than_three(self, group: str, tokens: int, kind: str = MAIN) -> str:
        """Gain in correlation over N = 3."""
        chosen = self.figures["groups"][group]
        return interval(chosen and chosen["more_than_three"][f"{kind}, {tokens}"], 3, sign=True)

    def partial(self, group: str, tokens: int, measure: str = "composite") -> str:
        """Partial correlation given N = 1."""
        chosen = self.figures["groups"][group]
        return interval(chosen and chosen["partial"][str(tokens)][measure])

    def distinct(self, group: str, tokens: int, table: str = "more_than_first") -> str:
        """`better`, `worse` or `not distinguishable from 0`: whether an interval excludes 0."""
        chosen = self.figures["groups"][group]
        if not chosen:
            return "not stated"
        if table == "more_than_first":
            figures = chosen[table][str(tokens)]["composite"]
        else:
            figures = chosen[table][f"{MAIN}, {tokens}"]
        return (
            "better"
            if figures["low"] > 0
            else "worse"
            if figures["high"] < 0
            else "not distinguishable from 0"
        )

    def last_gain(self, group: str) -> int | None:
        """The last N whose gain over the N before it excludes 0; None where there is none."""
        chosen = self.figures["groups"][group]
        if not chosen:
            return None
        steps = [n for n in POSITIONS[1:] if chosen["step"][str(n)]["low"] > 0]
        return max(steps, default=None)

    def ordered(self, subset: str, tokens: int) -> str:
        """Share of tied pairs that KL at N orders rightly."""
        return interval(self.figures["ties"][subset]["right"][str(tokens)])

    def pick(self, tokens: int, kind: str = MAIN) -> Mapping[str, Any] | None:
        """What a search would pick, and its regret."""
        regret = self.figures["regret"]
        return None if regret is None else regret["picks"][f"{kind}, {tokens}"]

    def cell(self, prompts: int, tokens: int) -> Mapping[str, float]:
        """Precision of so many prompts and positions."""
        (chosen,) = (
            cell
            for cell in self.figures["precision"]["cells"]
            if (cell["prompts"], cell["tokens"]) == (prompts, tokens)
        )
        return chosen

    def within(self, seconds: float) -> Mapping[str, float]:
        """The cell of highest correlation that takes no longer."""
        cells = self.figures["precision"]["cells"]
        affordable = [cell for cell in cells if cell["seconds"] <= seconds]
        return max(affordable, key=lambda cell: float(cell["spearman"]))

    @property
    def prompt_counts(self) -> list[int]:
        """Of the precision table."""
        return sorted({cell["prompts"] for cell in self.figures["precision"]["cells"]})

    def families(self) -> Iterator[tuple[str, int, Mapping[str, float]]]:
        """Family, its edits, and what it gains and loses on human text."""
        for family in (*ABLATIONS, LEARNED, "noise", "rounding", "fine-tune"):
            if family in self.figures["families"]:
                yield family, self.figures["families"][family], self.figures["gains"][family]


NAMES = {
    "view": View, "interval": interval, "SHOWN": SHOWN, "POSITIONS": POSITIONS, "MAIN": MAIN,
    "TITLES": TITLES, "MEASURES": MEASURES, "COMPOSITE": COMPOSITE, "model_title": model_title,
}  # fmt: skip
"""What the page's template may use."""
