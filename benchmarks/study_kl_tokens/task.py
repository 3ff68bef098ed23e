"""What every edit is measured on: prompts, human text and questions. Runs no model.

The prompts of the KL, of the damage and of making edits are different prompts. They are the study's
own copy of built-in prompts of its date, so that measured rows can be continued after those change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from heretic_kl.prompts import Prompt

DATA = Path(__file__).parent / "data"
POSITIONS = (1, 2, 3, 5, 8, 16, 32, 64)
"""Every N at which a KL is stated."""
LONGEST = POSITIONS[-1]
GEOMETRIC_RATIO = 0.8
CATEGORIES = {
    "own": ("chat", "science", "mathematics"),
    "own code": ("code",),
    "own scripts": ("chinese", "russian"),
}
"""Measure -> categories of the panel whose prompts the reference responds to."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured of each edit."""

    kl: int = 24
    """Harmless prompts of the KL, greedy path."""
    sampled: int = 12
    """Of these, with a sampled response as well."""
    long: int = 6
    """Prompts of long responses, those of `long_pool` whose reference response is longest."""
    long_pool: int = 16
    long_tokens: int = 256
    harmful: int = 20
    borderline: int = 12
    verdict_tokens: int = 16
    """Of responses that are judged as refusals."""
    panel: int = 3
    """Of each category."""
    panel_tokens: int = 48
    text_tokens: int = 96
    """Scored tokens of each text, after `text_context` that are not."""
    text_context: int = 8
    questions: int = 50
    making: int = 48
    """Prompts of each kind that directions and learned edits come from."""
    checked: int = 16
    """Of each kind, on which learning is checked."""
    learning_steps: int = 40
    tuning_steps: int = 16
    together: int = 6
    """Edits whose responses are generated side by side."""


SIZES = {
    "full": Sizes(),
    "half": Sizes(
        kl=12, sampled=6, long=4, long_pool=8, long_tokens=128, harmful=12, borderline=8, panel=2,
        panel_tokens=32, text_tokens=64, questions=30, making=32, checked=8, learning_steps=20,
        tuning_steps=8,
    ),
    "quick": Sizes(
        kl=8, sampled=4, long=3, long_pool=6, long_tokens=96, harmful=8, borderline=6, panel=1,
        panel_tokens=32, text_tokens=48, questions=20, making=24, checked=8, learning_steps=8,
        tuning_steps=4,
    ),
    "tiny": Sizes(
        kl=3, sampled=2, long=2, long_pool=3, long_tokens=6, harmful=3, borderline=2,
        verdict_tokens=3, panel=1, panel_tokens=4, text_tokens=6, text_context=2, questions=4,
        making=4, checked=2, learning_steps=2, tuning_steps=2, together=3,
    ),
}  # fmt: skip
"""`half` is for larger models, `tiny` for tests with a random one."""


@dataclass(frozen=True)
class Text:
    """A passage of human text."""

    use: str
    """held out: measured; tuning: a fine-tune reads it."""
    group: str
    """prose, code or scripts."""
    source: str
    text: str


@dataclass(frozen=True)
class Questions:
    """Closed questions with their right answers, and what is put before each of them."""

    before: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]

    def texts(self) -> list[str]:
        """What the model continues, one a question."""
        return [self.before + _asked(question) for question in self.questions]

    def right(self, index: int, response: str) -> bool:
        """Whether a response is exactly the answer, case and a full stop aside."""
        return response.strip().rstrip(".").casefold() == self.answers[index].casefold()


@cache
def _stored_prompts() -> tuple[Mapping[str, str], ...]:
    lines = (DATA / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def prompts(kind: str, use: str, limit: int, skip: int = 0) -> tuple[Prompt, ...]:
    """The study's prompts of a kind and use after `skip` of them.

    Raises:
        ValueError: there are fewer.
    """
    texts = [row["text"] for row in _stored_prompts() if (row["kind"], row["use"]) == (kind, use)]
    if skip + limit > len(texts):
        raise ValueError(f"{skip + limit} {kind} {use} prompts are wanted; there are {len(texts)}")
    return tuple(Prompt(text) for text in texts[skip : skip + limit])


def panel_prompts(per_category: int) -> dict[str, tuple[Prompt, ...]]:
    """Measure (see `CATEGORIES`) -> the first panel prompts of each of its categories."""
    by_category: dict[str, list[Prompt]] = {}
    for row in _stored_prompts():
        if row["kind"] == "panel":
            by_category.setdefault(row["category"], []).append(Prompt(row["text"]))
    return {
        measure: tuple(p for name in categories for p in by_category[name][:per_category])
        for measure, categories in CATEGORIES.items()
    }


def human_texts(use: str) -> list[Text]:
    """Passages of a use: out of copyright, or written for the file."""
    lines = (DATA / "human_text.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for text in (Text(**json.loads(line)) for line in lines) if text.use == use]


def closed_questions(limit: int) -> Questions:
    """Evenly spaced ones of all kinds."""
    content = json.loads((DATA / "questions.json").read_text(encoding="utf-8"))
    pairs = content["questions"]
    chosen = [pairs[index * len(pairs) // limit] for index in range(limit)]
    before = "".join(
        _asked(question) + f" {answer}\n\n" for question, answer in content["examples"]
    )
    return Questions(before, *(tuple(column) for column in zip(*chosen, strict=True)))


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"
