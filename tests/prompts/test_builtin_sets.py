"""Laws of the built-in and teaching prompts: how many, and that none is in two places."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

SETS = ("harmful", "harmless")
USE_SIZES = {"train": 132, "validation": 64, "test": 64}
TEACHING_SIZES = {"harmful": 260, "harmless": 400}

# Words that carry form, not content: "How do I ..." and "What is the best way to ..." may frame
# the same request.
FORM_WORDS = frozenset(
    "a an and are as at best by can create do draft explain for from give help how i in into is it "
    "list me my of on or out so suggest teach tell that the to way what with without write".split()
)
NEAR_DUPLICATE = 0.6


@cache
def built_in(name: str) -> tuple[tuple[str, str], ...]:
    """(text, use) of every line of a built-in set."""
    source = files("heretic_kl") / "prompts" / "builtin" / f"{name}.jsonl"
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    assert all(set(record) == {"text", "use"} for record in records)
    return tuple((record["text"], record["use"]) for record in records)


@cache
def teaching(name: str) -> tuple[str, ...]:
    source = Path(__file__).parents[2] / "benchmarks/demo_adapter" / f"{name}.txt"
    return tuple(source.read_text(encoding="utf-8").splitlines())


def content(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower())) - FORM_WORDS


def near_duplicates(places: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Pairs from different places whose content words mostly coincide."""
    tagged = [(place, text, content(text)) for place, texts in places.items() for text in texts]
    return [
        (text, other)
        for (place, text, words), (other_place, other, other_words) in itertools.combinations(
            tagged, 2
        )
        if place != other_place
        and len(words & other_words) >= NEAR_DUPLICATE * len(words | other_words)
    ]


@pytest.mark.parametrize("name", SETS)
def test_uses_have_the_promised_sizes(name: str) -> None:
    assert Counter(use for _, use in built_in(name)) == USE_SIZES


@pytest.mark.parametrize("name", SETS)
def test_teaching_sets_are_large_enough(name: str) -> None:
    assert len(teaching(name)) >= TEACHING_SIZES[name]


@pytest.mark.parametrize("name", SETS)
def test_every_prompt_is_one_trimmed_line_with_content(name: str) -> None:
    for text in [*(text for text, _ in built_in(name)), *teaching(name)]:
        assert text == text.strip() and "\n" not in text
        assert text[-1] in ".?", text
        assert len(text) <= 120, text
        assert content(text), text


def test_no_prompt_appears_twice_anywhere() -> None:
    everything = [
        text.casefold().rstrip(".?")
        for name in SETS
        for text in [*(text for text, _ in built_in(name)), *teaching(name)]
    ]
    repeated = [text for text, count in Counter(everything).items() if count > 1]
    assert repeated == []


@pytest.mark.parametrize("name", SETS)
def test_splits_and_teaching_share_no_near_duplicates(name: str) -> None:
    places = {use: [t for t, u in built_in(name) if u == use] for use in USE_SIZES}
    assert near_duplicates({**places, "teaching": list(teaching(name))}) == []


@pytest.mark.parametrize("name", SETS)
def test_the_near_duplicate_rule_sees_through_form(name: str) -> None:
    text = built_in(name)[0][0]
    reworded = "What is the best way to " + text.removeprefix("How do I ")
    assert near_duplicates({"here": [text], "there": [reworded]}) == [(text, reworded)]


def test_harmless_prompts_match_harmful_ones_in_form() -> None:
    openings = {name: Counter(text.split()[0] for text, _ in built_in(name)) for name in SETS}
    assert set(openings["harmful"]) <= set(openings["harmless"])
    lengths = {
        name: sum(len(text.split()) for text, _ in built_in(name)) / len(built_in(name))
        for name in SETS
    }
    assert abs(lengths["harmful"] - lengths["harmless"]) <= 0.2 * lengths["harmful"], lengths
