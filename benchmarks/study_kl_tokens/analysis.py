"""The planned analysis of one model's rows: JSON-ready figures. Draws and writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.study_kl_tokens.edits import all_edits
from benchmarks.study_kl_tokens.task import POSITIONS
from benchmarks.study_kl_tokens.variants import MAIN, MEASURES, OPERATORS, Array, Study

DRAWS = 1000
SEED = 0
APART = 0.1
"""Difference of composites from which two edits differ in damage."""
ADMISSIBLE = 0.1
"""Share of refusals up to which a search would take an edit."""
LAYERS = 30
"""Of any model: the number of edits does not depend on it."""
FEWEST = 12
"""Edits of a group below which nothing is stated of it."""
SUBSETS = 200
"""Draws of fewer prompts."""
COMPARED = (3, 8, 16, 64)
Figures = dict[str, Any]


@dataclass(frozen=True)
class Draw:
    """Edits and prompts of one draw of the bootstrap."""

    edits: NDArray[np.intp]
    prompts: NDArray[np.intp]


def analyse(study: Study, draws: int = DRAWS) -> Figures:
    """Everything that the plan names."""
    header = study.file.header
    return {
        "model": header["model"],
        "date": header["date"],
        "dtype": header["dtype"],
        "machine": header["machine"],
        "sizes": header["sizes"],
        "edits": len(study.rows),
        "planned": len(all_edits(LAYERS, header["edits"])) - 1,
        "families": dict(Counter(study.families)),
        "reference_refused": study.reference_refused,
        "right": int(sum(header["right"])),
        "cpu_seconds_an_edit": round(float(np.median([row.seconds for row in study.rows])), 1),
        "cpu_minutes": round(sum(row.seconds for row in study.file.rows) / 60, 1),
        "groups": {
            name: group_figures(study, chosen, draws, name == OPERATORS)
            for name, chosen in study.groups.items()
        },
        "free_floor": round(float(study.nothing.arrays["free"][:, -1].mean()), 3),
        "ties": ties(study, draws),
        "precision": precision(study),
        "regret": regret(study, draws),
        "parting": parting(study),
        "gains": gains(study),
        "scatter": scatter(study),
    }


def group_figures(
    study: Study, chosen: NDArray[np.bool_], draws: int, every_measure: bool = True
) -> Figures | None:
    """Correlations within a group of edits; None where it has too few.

    Args:
        study: rows of a model.
        chosen: (E,) which edits.
        draws: of the bootstrap.
        every_measure: state those of other variants than the main one with each measure too.
    """
    members = np.flatnonzero(chosen)
    if len(members) < FEWEST:
        return None
    targets = np.stack([study.composite, *(study.damage[name] for name in MEASURES)])
    names = ("composite", *MEASURES)
    point = _correlations(study, targets, Draw(members, _all_prompts(study)))
    drawn = np.stack(
        [
            _correlations(study, targets, draw)
            for draw in _bootstrap(members, len(_all_prompts(study)), draws)
        ]
    )  # (draws, V, M)
    keys = [(variant.kind, variant.tokens) for variant in study.variants]
    main = [keys.index((MAIN, tokens)) for tokens in POSITIONS]
    return {
        "edits": len(members),
        "spearman": {
            f"{kind}, {tokens}": {
                name: _with_interval(point[v, m], drawn[:, v, m])
                for m, name in enumerate(names)
                if every_measure or kind == MAIN or name == "composite"
            }
            for v, (kind, tokens) in enumerate(keys)
        },
        "more_than_first": {
            str(tokens): {
                name: _with_interval(
                    point[v, m] - point[main[0], m], drawn[:, v, m] - drawn[:, main[0], m]
                )
                for m, name in enumerate(names)
            }
            for tokens, v in zip(POSITIONS, main, strict=True)
        },
        "more_than_three": _against(point, drawn, keys, (MAIN, 3)),
        "partial": _partial(study, members, targets, draws, names),
        "step": {
            str(POSITIONS[index]): _with_interval(
                point[main[index], 0] - point[main[index - 1], 0],
                drawn[:, main[index], 0] - drawn[:, main[index - 1], 0],
            )
            for index in range(1, len(POSITIONS))
        },
    }


def _against(point: Array, drawn: Array, keys: Sequence[tuple[str, int]], other: Any) -> Figures:
    """Correlation of every variant with the composite, minus that of another variant."""
    base = keys.index(other)
    return {
        f"{kind}, {tokens}": _with_interval(
            point[v, 0] - point[base, 0], drawn[:, v, 0] - drawn[:, base, 0]
        )
        for v, (kind, tokens) in enumerate(keys)
    }


def _correlations(study: Study, targets: Array, draw: Draw) -> Array:
    """Spearman (V, M) of all variants with all targets (M, E)."""
    values = np.stack(
        [
            variant.values(draw.prompts % variant.numerator.shape[1])[draw.edits]
            for variant in study.variants
        ]
    )
    return _standard_ranks(values) @ _standard_ranks(targets[:, draw.edits]).T


def _standard_ranks(values: Array) -> Array:
    """Ranks along the last axis, centred, of unit length; zeros where all are equal."""
    ranks = rankdata(values, axis=-1)
    centred = ranks - ranks.mean(-1, keepdims=True)
    return np.asarray(centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-12))


def _partial(
    study: Study, members: NDArray[np.intp], targets: Array, draws: int, names: Sequence[str]
) -> Figures:
    """Partial rank correlation of N > 1 with damage, given N = 1."""

    def of(draw: Draw) -> Array:
        values = [study.variant(n).values(draw.prompts)[draw.edits] for n in POSITIONS]
        ranks, aims = _standard_ranks(np.stack(values)), _standard_ranks(targets[:, draw.edits])
        with_aim, with_first, first = ranks @ aims.T, ranks @ ranks[0], ranks[0] @ aims.T
        top = with_aim - with_first[:, None] * first[None]
        bottom = np.sqrt((1 - with_first**2).clip(0)[:, None] * (1 - first**2).clip(0)[None])
        return np.asarray(np.where(bottom > 1e-9, top / np.maximum(bottom, 1e-9), 0.0))

    point = of(Draw(members, _all_prompts(study)))
    drawn = np.stack([of(d) for d in _bootstrap(members, len(_all_prompts(study)), draws)])
    return {
        str(tokens): {
            name: _with_interval(point[n, m], drawn[:, n, m]) for m, name in enumerate(names)
        }
        for n, tokens in enumerate(POSITIONS)
        if tokens > 1
    }


def ties(study: Study, draws: int) -> Figures:
    """Pairs equal in first-token KL within error that differ in damage; who orders them rightly.

    Each draw of the bootstrap finds its own pairs, among its edits and by its prompts.
    """
    edits = np.arange(len(study.rows))
    upper = np.triu(np.ones((len(edits), len(edits)), dtype=bool), 1)
    operators = study.groups[OPERATORS]
    bases = {"all edits": upper, OPERATORS: upper & np.outer(operators, operators)}
    drawn = list(_bootstrap(edits, len(_all_prompts(study)), draws))
    made: Figures = {}
    for name, base in bases.items():
        tied, differ, right = _ordered(study, base, Draw(edits, _all_prompts(study)))
        shares = np.stack([_ordered(study, base, draw)[2] for draw in drawn])
        made[name] = {
            "pairs": int(base.sum()),
            "tied": tied,
            "differ": differ,
            "right": {
                str(tokens): _with_interval(right[n], shares[:, n]) if differ else None
                for n, tokens in enumerate(POSITIONS)
            },
        }
    return made


def _ordered(study: Study, base: NDArray[np.bool_], draw: Draw) -> tuple[int, int, Array]:
    """Pairs (E, E) of `base` that are tied, those of them that differ, who orders these as damage.

    A pair of edits that were drawn a and b times counts a * b times.

    Returns:
        Two counts, and the share (8,) that KL at each N orders as the composite does.
    """
    first = study.variant(1).numerator[:, draw.prompts]
    covariance = np.cov(first)
    variance = np.diag(covariance)
    squared_error = (variance[:, None] + variance[None] - 2 * covariance).clip(0) / first.shape[1]
    mean = first.mean(1)
    tied = base & (np.abs(mean[:, None] - mean[None]) < 2 * np.sqrt(squared_error))
    gap = study.composite[:, None] - study.composite[None]
    rows, columns = np.nonzero(tied & (np.abs(gap) >= APART))
    times = np.bincount(draw.edits, minlength=len(first))
    weights = (times[rows] * times[columns]).astype(np.float64)
    if not weights.any():
        return int(tied.sum()), 0, np.full(len(POSITIONS), np.nan)
    values = np.stack([study.variant(n).values(draw.prompts) for n in POSITIONS])
    right = np.sign(values[:, rows] - values[:, columns]) == np.sign(gap[rows, columns])
    return int(tied.sum()), len(rows), right @ weights / weights.sum()


def precision(study: Study) -> Figures:
    """Correlation with the composite and error of the mean, by prompts and positions, at a cost."""
    timings = study.file.header["timings"]
    design = [[1, t["prompts"], t["prompts"] * t["positions"]] for t in timings]
    seconds = [t["seconds"] for t in timings]
    cost = np.linalg.lstsq(np.array(design, dtype=float), np.array(seconds), rcond=None)[0]
    most, draw = len(_all_prompts(study)), np.random.default_rng(SEED)
    chosen = np.flatnonzero(study.groups[OPERATORS])
    target = _standard_ranks(study.composite[chosen])
    cells = []
    for prompts in sorted({max(2, most // 8), max(2, most // 4), max(2, most // 2), most}):
        subsets = [
            draw.permutation(most)[:prompts] for _ in range(1 if prompts == most else SUBSETS)
        ]
        for tokens in POSITIONS:
            variant = study.variant(tokens)
            values = np.stack([variant.values(subset)[chosen] for subset in subsets])
            relative = variant.numerator[chosen].std(1, ddof=1) / np.sqrt(prompts)
            relative = relative / np.maximum(variant.values()[chosen], 1e-12)
            cells.append(
                {
                    "prompts": prompts,
                    "tokens": tokens,
                    "seconds": round(float(cost @ [1, prompts, prompts * tokens]), 3),
                    "spearman": round(float((_standard_ranks(values) @ target).mean()), 4),
                    "relative_error": round(float(np.median(relative)), 3),
                }
            )
    return {"seconds_by": [round(float(value), 5) for value in cost], "cells": cells}


def regret(study: Study, draws: int) -> Figures | None:
    """Damage of what a search would pick, beyond the least; None where little is refused."""
    operators = study.groups[OPERATORS]
    admissible = np.flatnonzero(operators & (study.refused <= ADMISSIBLE))
    if not study.refuses_enough or len(admissible) < 2:
        return None
    kinds = [v for v in study.variants if v.kind not in ("before parting", "from parting on")]
    sets = list(_bootstrap(admissible, len(_all_prompts(study)), draws))
    made: Figures = {"admissible": len(admissible), "picks": {}}
    for variant in kinds:
        values = variant.values()[admissible]
        pick = int(admissible[values.argmin()])
        least = study.composite[admissible].min()
        regrets = [
            study.composite[
                d.edits[variant.values(d.prompts % variant.numerator.shape[1])[d.edits].argmin()]
            ]
            - study.composite[d.edits].min()
            for d in sets
        ]
        made["picks"][f"{variant.kind}, {variant.tokens}"] = {
            "edit": study.names[pick],
            "regret": round(float(study.composite[pick] - least), 4),
            "mean_regret": round(float(np.mean(regrets)), 4),
            "interval": [round(float(v), 4) for v in np.percentile(regrets, [2.5, 97.5])],
        }
    return made


def parting(study: Study) -> Figures:
    """Where greedy responses part, and the KL before and from there on; medians over edits."""
    places = study.array("parting")
    width = study.positions.shape[2]
    ends = np.array(study.file.header["lengths"]["greedy"])
    before, after = (
        next(v for v in study.variants if v.kind == kind)
        for kind in ("before parting", "from parting on")
    )
    return {
        "median_first_position": float(np.median(np.minimum(places, ends[None]))) + 1,
        "never": round(float((places >= width).mean()), 3),
        "at_the_first": round(float((places == 0).mean()), 3),
        "median_kl_before": round(float(np.median(before.values())), 4),
        "median_kl_from_there": round(float(np.median(after.values())), 4),
    }


def gains(study: Study) -> Figures:
    """On human text, by family: share of tokens predicted better, and what is gained and lost."""
    names = ("text better", "text gain", "text loss")
    arrays = {name: study.array(name).mean(1) for name in names}
    families = np.array(study.families)
    return {
        family: {name: round(float(arrays[name][families == family].mean()), 4) for name in names}
        for family in sorted(set(study.families))
    }


def scatter(study: Study) -> list[Figures]:
    """Each edit: family, KL at several N, composite, share of refusals."""
    return [
        {
            "edit": name,
            "family": family,
            **{f"kl_{n}": float(f"{study.variant(n).values()[i]:.4g}") for n in (1, *COMPARED)},
            "composite": round(float(study.composite[i]), 4),
            "refused": round(float(study.refused[i]), 3),
        }
        for i, (name, family) in enumerate(zip(study.names, study.families, strict=True))
    ]


def _all_prompts(study: Study) -> NDArray[np.intp]:
    return np.arange(study.variant(1).numerator.shape[1])


def _bootstrap(members: NDArray[np.intp], prompts: int, draws: int) -> Any:
    """Draws of edits and, independently, of prompts; the same for every figure of a group.

    A variant of fewer prompts takes the drawn numbers modulo its own.
    """
    draw = np.random.default_rng(SEED)
    for _ in range(draws):
        yield Draw(draw.choice(members, len(members)), draw.integers(prompts, size=prompts))


def _with_interval(point: float, drawn: Array) -> Figures:
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {
        "value": round(float(point), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
    }
