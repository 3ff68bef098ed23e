"""KL variants and damage of a results file as arrays over edits. Correlates nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.study_kl_tokens.edits import ABLATIONS, LEARNED, NOTHING
from benchmarks.study_kl_tokens.rows import Row, RowsFile
from benchmarks.study_kl_tokens.task import CATEGORIES, POSITIONS

Array = NDArray[np.float64]
DIVERGENCES = ("forward", "reverse", "jensen_shannon")
WEIGHTS = ("uniform", "geometric")
CONFIDENT = 0.9
COMPOSITE = ("prose", "code", "scripts", "answers", "changed", "repetition", "dissimilarity")
"""Measures whose mean rank is the composite."""
MEASURES = (*COMPOSITE, "degenerate", "evasive", "false refusals", *CATEGORIES)


@dataclass(frozen=True)
class Variant:
    """One way to state a KL of every edit, nats.

    The value of an edit is sum(c * numerator) / sum(c * denominator) over prompts that were drawn
    c times, or the median of numerator / denominator.
    """

    kind: str
    """What it is, N aside: `greedy forward uniform mean`."""
    tokens: int
    numerator: Array  # (E, P)
    denominator: Array  # (1, P) or (E, P)
    median: bool = False

    def values(self, prompts: NDArray[np.intp] | None = None) -> Array:
        """(E,) of all prompts, or of drawn ones (P,)."""
        top, bottom = self.numerator, np.broadcast_to(self.denominator, self.numerator.shape)
        if prompts is not None:
            top, bottom = top[:, prompts], bottom[:, prompts]
        if self.median:
            return np.asarray(np.median(top / bottom, axis=1))
        return np.asarray(top.sum(1) / np.maximum(bottom.sum(1), 1e-12))


MAIN = "greedy forward uniform mean"
OPERATORS = "ablations and learned"
USEFUL = "useful"


@dataclass(frozen=True)
class Study:
    """Rows of one model's edits, the one that does nothing apart."""

    file: RowsFile

    @cached_property
    def nothing(self) -> Row:
        """The edit that does nothing: what the reference itself has.

        Raises:
            SystemExit: it was not measured.
        """
        for row in self.file.rows:
            if row.edit == NOTHING:
                return row
        raise SystemExit(f"{self.file.path} lacks the edit that does nothing: measure it first")

    @cached_property
    def rows(self) -> list[Row]:
        """Measured edits whose numbers are all finite."""
        return [
            row
            for row in self.file.rows
            if row.edit != NOTHING and bool(row.arrays["greedy forward"].isfinite().all())
        ]

    @property
    def names(self) -> list[str]:
        """Of the edits."""
        return [row.edit for row in self.rows]

    @property
    def families(self) -> list[str]:
        """Of the edits."""
        return [row.family for row in self.rows]

    def array(self, name: str, rows: Sequence[Row] | None = None) -> Array:
        """(E, ...) of what was measured."""
        chosen = self.rows if rows is None else rows
        return np.stack([row.arrays[name].double().numpy() for row in chosen])

    @cached_property
    def refused(self) -> Array:
        """(E,) share of harmful prompts refused."""
        return np.asarray(self.array("refused").mean(1))

    @property
    def reference_refused(self) -> float:
        """The reference's share."""
        return float(self.nothing.arrays["refused"].mean())

    @cached_property
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Name -> which edits."""
        operators = np.array([family in (*ABLATIONS, LEARNED) for family in self.families])
        useful = operators & (self.refused <= self.reference_refused / 2)
        return {
            "all edits": np.ones(len(self.rows), dtype=bool),
            OPERATORS: operators,
            USEFUL: useful if self.refuses_enough else operators,
        }

    @property
    def refuses_enough(self) -> bool:
        """Whether the reference refuses at least half of the harmful prompts."""
        return self.reference_refused >= 0.5

    @cached_property
    def damage(self) -> dict[str, Array]:
        """Measure -> (E,) the edit's minus the reference's; more is worse."""
        groups = np.array(self.file.header["text_groups"])
        nll = self.array("text nll")
        made = {
            group: nll[:, groups == group].mean(1) if group in groups else np.zeros(len(nll))
            for group in ("prose", "code", "scripts")
        }
        right = np.array(self.file.header["right"], dtype=bool)
        changed = self.array("changed")
        made["changed"] = changed.mean(1)
        made["answers"] = changed[:, right].mean(1) if right.any() else np.zeros(len(changed))
        others = ("repetition", "dissimilarity", "degenerate", "evasive", "false refusals")
        for name in (*others, *CATEGORIES):
            made[name] = self.array(name).mean(1) - float(self.nothing.arrays[name].mean())
        return {name: np.asarray(made[name]) for name in MEASURES}

    @cached_property
    def composite(self) -> Array:
        """(E,) mean rank over `COMPOSITE`, as a share of the edits, 0 to 1."""
        ranks = [rankdata(self.damage[name]) / len(self.rows) for name in COMPOSITE]
        return np.asarray(np.mean(ranks, axis=0))

    @cached_property
    def variants(self) -> list[Variant]:
        """All of them."""
        made = []
        for path in ("greedy", "sampled"):
            for divergence in DIVERGENCES:
                table = self.array(f"{path} {divergence}")  # (E, 2, P, 8)
                for index, weights in enumerate(WEIGHTS):
                    made += _means(f"{path} {divergence} {weights} mean", table[:, index])
        forward = self.array("greedy forward")[:, 0]
        made += [
            Variant("greedy forward uniform median", v.tokens, v.numerator, v.denominator, True)
            for v in _means("", forward)
        ]
        made += self._buckets() + self._around_parting()
        made += _means("paired: same prefix", self.array("paired forward")[:, 0])
        made += _means("free-running", self.array("free"))
        return made

    def variant(self, tokens: int, kind: str = MAIN) -> Variant:
        """One of them."""
        (chosen,) = (v for v in self.variants if v.kind == kind and v.tokens == tokens)
        return chosen

    @cached_property
    def positions(self) -> Array:
        """(E, P, T) forward KL, NaN behind a response's end."""
        return self.array("greedy forward positions")

    def _buckets(self) -> list[Variant]:
        confidence = self.file.header["confidence"].double().numpy()
        made = []
        for name, chosen in (
            ("confident", confidence >= CONFIDENT),
            ("unsure", confidence < CONFIDENT),
        ):
            for tokens in POSITIONS:
                inside = chosen.copy()
                inside[:, tokens:] = False
                top = np.where(inside, self.positions, 0.0).sum(2)
                bottom = inside.sum(1)[None].astype(np.float64)
                made.append(Variant(f"greedy forward uniform {name}", tokens, top, bottom))
        return made

    def _around_parting(self) -> list[Variant]:
        """KL before the two greedy responses part, and from there on."""
        width = self.positions.shape[2]
        before = np.arange(width) < self.array("parting")[:, :, None]
        scored = ~np.isnan(self.positions)
        made = []
        for name, chosen in (("before parting", before), ("from parting on", ~before)):
            top = np.where(chosen & scored, self.positions, 0.0).sum(2)
            made.append(Variant(name, width, top, (chosen & scored).sum(2).astype(np.float64)))
        return made


def _means(kind: str, table: Array) -> list[Variant]:
    """Of (E, P, 8) means over the first N positions."""
    return [
        Variant(kind, tokens, table[:, :, index], np.ones((1, table.shape[1])))
        for index, tokens in enumerate(POSITIONS)
    ]
