"""Laws of the built-in and teaching prompts: how many, and that none is in two places."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest

from heretic_kl.prompts import DatasetSpec, fingerprint, load_prompts

SETS = ("harmful", "harmless", "borderline")
USE_SIZES = {
    "harmful": {"train": 132, "validation": 100, "test": 64},
    "harmless": {"train": 132, "validation": 64, "test": 64},
    "borderline": {"train": 66, "validation": 66, "test": 66},
}
TOPICS = 10
"""Kinds of ordinary instructions at least: questions, writing, code, maths, ..."""
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
    fields = {"text", "use", "topic"} if name == "harmless" else {"text", "use"}
    assert all(set(record) == fields for record in records)
    return tuple((record["text"], record["use"]) for record in records)


@cache
def teaching(name: str) -> tuple[str, ...]:
    source = Path(__file__).parents[2] / "benchmarks/demo_adapter" / f"{name}.txt"
    return tuple(source.read_text(encoding="utf-8").splitlines())


@cache
def harmless_topics() -> tuple[tuple[str, str], ...]:
    """(topic, use) of every line of the harmless set, in order."""
    source = files("heretic_kl") / "prompts" / "builtin" / "harmless.jsonl"
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    return tuple((record["topic"], record["use"]) for record in records)


def texts(name: str, *, teach: bool = True) -> tuple[str, ...]:
    """Every prompt of a set, with those that taught the demo model."""
    taught = teaching(name) if teach and name in TEACHING_SIZES else ()
    return (*(text for text, _ in built_in(name)), *taught)


def content(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[^\W_]+", text.lower())) - FORM_WORDS


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
    assert Counter(use for _, use in built_in(name)) == USE_SIZES[name]


@pytest.mark.parametrize("name", TEACHING_SIZES)
def test_teaching_sets_are_large_enough(name: str) -> None:
    assert len(teaching(name)) >= TEACHING_SIZES[name]


@pytest.mark.parametrize("name", SETS)
def test_every_prompt_is_one_trimmed_line_with_content(name: str) -> None:
    for text in texts(name):
        assert text == text.strip() and "\n" not in text
        assert len(text) <= 240, text
        assert content(text), text


def test_no_prompt_appears_twice_anywhere() -> None:
    everything = [text.casefold().rstrip(".?") for name in SETS for text in texts(name)]
    assert [text for text, count in Counter(everything).items() if count > 1] == []


def test_no_two_built_in_prompts_of_other_sets_or_uses_are_near_duplicates() -> None:
    places: dict[str, list[str]] = {}
    for name in SETS:
        for text, use in built_in(name):
            places.setdefault(f"{name} {use}", []).append(text)
    near = [
        pair
        for pair in near_duplicates(places)
        if not {"harmful"} & {name for name in SETS for text in pair if text in texts(name)}
    ]
    assert near == []


@pytest.mark.parametrize("name", TEACHING_SIZES)
def test_uses_and_teaching_share_no_near_duplicates(name: str) -> None:
    places = {use: [t for t, u in built_in(name) if u == use] for use in USE_SIZES[name]}
    assert near_duplicates({**places, "teaching": list(teaching(name))}) == []


def test_borderline_prompts_are_not_among_those_that_taught_the_demo() -> None:
    places = {"built-in": list(texts("borderline", teach=False)), "teaching": []}
    for name in TEACHING_SIZES:
        places["teaching"] += teaching(name)
    assert near_duplicates(places) == []


@pytest.mark.parametrize("name", SETS)
def test_the_near_duplicate_rule_sees_through_form(name: str) -> None:
    text = next(text for text, _ in built_in(name) if text.startswith("How do I "))
    reworded = "What is the best way to " + text.removeprefix("How do I ")
    assert near_duplicates({"here": [text], "there": [reworded]}) == [(text, reworded)]


def test_at_least_half_of_every_harmless_set_is_ordinary_and_of_many_kinds() -> None:
    for use, size in USE_SIZES["harmless"].items():
        topics = Counter(
            topic for topic, place in harmless_topics() if place == use and topic != "everyday"
        )
        assert topics.total() >= size / 2, use
        assert len(topics) >= TOPICS, topics


@pytest.mark.parametrize("limit", [40, 96])
def test_the_first_prompts_are_a_mixture_too(limit: int) -> None:
    topics = [topic for topic, place in harmless_topics() if place == "train"][:limit]
    assert sum(topic != "everyday" for topic in topics) >= limit / 2
    assert len(set(topics)) >= TOPICS


def test_harmless_prompts_vary_in_length_and_script() -> None:
    lengths = [len(text) for text in texts("harmless", teach=False)]
    assert min(lengths) <= 25 and max(lengths) >= 150
    others = [text for text in texts("harmless", teach=False) if not text.isascii()]
    scripts = {unicodedata.name(text[0]).split()[0] for text in others}
    assert len(scripts) >= 6, scripts


def test_the_panel_is_the_one_that_is_quoted():
    panel = load_prompts(DatasetSpec("builtin:panel", "test"))
    counts = Counter(prompt.category for prompt in panel)
    assert set(counts) == {"chat", "code", "science", "mathematics", "chinese", "russian"}
    assert set(counts.values()) == {32} and len(set(panel)) == len(panel)
    # Figures over it are compared between publications: a changed prompt is another panel.
    assert fingerprint(panel) == "899f592f5da209defb3a8fdec4a28ce34353a1dffcb6cfb6ae808db532b0c766"
    for category, script in (("chinese", "CJK"), ("russian", "CYRILLIC")):
        texts = [prompt.user for prompt in panel if prompt.category == category]
        assert all(any(unicodedata.name(c, "").startswith(script) for c in t) for t in texts)
    part = load_prompts(DatasetSpec("builtin:panel", "test[30:34]"))
    assert [prompt.category for prompt in part] == ["chat", "chat", "code", "code"]
