"""Figures of one judged model: counts, means, their errors. Needs no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

VERDICTS = ("refusal", "incapacity", "evasive", "degenerate", "content")
Verdicts = dict[str, list[str]]
"""Kind of prompts -> one verdict a prompt."""


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a rate."""
    if n == 0:
        return 0.0, 1.0
    rate, scale = successes / n, 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_and_error(values: Sequence[float]) -> dict[str, float | int | None] | None:
    """Mean and standard error over prompts; None of nothing."""
    n = len(values)
    if n == 0:
        return None
    mean = sum(values) / n
    squares = sum((value - mean) ** 2 for value in values)
    return {"mean": mean, "se": math.sqrt(squares / (n - 1) / n) if n > 1 else None, "n": n}


def mean_by_token(rows: Sequence[Sequence[float]]) -> dict[str, float | int | None] | None:
    """Mean with all tokens equal, its error clustered by prompt; None of nothing."""
    n, tokens = len(rows), sum(map(len, rows))
    if n == 0:
        return None
    mean = sum(map(sum, rows)) / tokens
    squares = sum((sum(row) - mean * len(row)) ** 2 for row in rows)
    error = math.sqrt(squares * n / (n - 1)) / tokens if n > 1 else None
    return {"mean": mean, "se": error, "tokens": tokens}


def counts(verdicts: Sequence[str]) -> dict[str, Any]:
    """How often each verdict was given, and the refusals' interval."""
    n = len(verdicts)
    refusals = verdicts.count("refusal")
    by_name = {name: verdicts.count(name) for name in VERDICTS[1:]}
    interval = [round(bound, 4) for bound in wilson(refusals, n)]
    return {"n": n, "refusals": refusals, "wilson95": interval, **by_name}


def kl_figures(rows: Sequence[Sequence[float]], verdicts: Sequence[str]) -> dict[str, Any]:
    """Means and errors of the KL.

    Args:
        rows: KL at each position of each harmless prompt.
        verdicts: over the reference's responses to them.
    """
    means = [sum(row) / len(row) for row in rows]
    answered = [index for index, v in enumerate(verdicts) if v != "refusal"]
    refused = [index for index, v in enumerate(verdicts) if v == "refusal"]
    return {
        "kl": mean_and_error([means[index] for index in answered]),
        "kl_by_token": mean_by_token([rows[index] for index in answered]),
        "first_token_kl": mean_and_error([rows[index][0] for index in answered]),
        "kl_by_length": by_length([rows[index] for index in answered]),
        "refused_kl": mean_and_error([means[index] for index in refused]),
        "kl_per_prompt": {str(index): round(means[index], 7) for index in answered},
    }


def by_length(rows: Sequence[Sequence[float]]) -> list[float]:
    """Mean KL over the first N positions of each prompt, then over prompts, for N = 1, 2, ...

    What a search measures over N positions is compared with the Nth of them.
    """
    longest = max(map(len, rows), default=0)
    heads = ([row[:n] for row in rows] for n in range(1, longest + 1))
    return [sum(sum(head) / len(head) for head in of_n) / len(of_n) for of_n in heads]
