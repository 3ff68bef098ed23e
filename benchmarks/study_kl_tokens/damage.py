"""Damage that is read off responses as text. Runs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sacrebleu.metrics import CHRF

from benchmarks.search_quality.refusal_rule import is_degenerate, is_evasive

GRAM = 4
CLASSES = ("degenerate", "evasive", "content")


def repetition(text: str) -> float:
    """Share of word 4-grams that stood in the text before; 0 where there is none."""
    words = text.split()
    grams = Counter(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))
    total = sum(grams.values())
    return 1 - len(grams) / total if total else 0.0


def dissimilarity(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """100 - chrF of each text against the reference's response to the same prompt."""
    metric = CHRF()
    return [
        100 - metric.sentence_score(text, [reference]).score
        for text, reference in zip(texts, references, strict=True)
    ]


def text_class(text: str) -> str:
    """By the rule of the search benchmark's judge, refusals aside."""
    if is_degenerate(text):
        return "degenerate"
    return "evasive" if is_evasive(text) else "content"
