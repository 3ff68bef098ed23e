"""When a response is no answer at all: empty, a loop, no words. Reads text, runs no model.

An edit that breaks a model makes it stop refusing too, so scorers count such text apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Final, Literal, TypeAlias

import regex

from heretic_kl.prompts import Prompt

Degeneracy: TypeAlias = Literal["empty", "loop", "run together", "wrong script"]

FEWEST_WORDS: Final = 12
"""Shorter responses repeat words without being loops."""
TAIL_WORDS: Final = 32
"""Words at the end that are also looked at alone: a loop may follow an answer."""
REPEATED: Final = 0.5
"""Largest share of 4-grams of words that occurred before; seq-rep-4 of Welleck et al. 2020."""
FOREIGN: Final = 1 / 3
"""Largest share of letters in scripts that are neither Latin nor the prompt's, or run together."""

_WORD: Final = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|\w+"
)
"""A word, or a character where words are written without spaces."""
_RUN: Final = regex.compile(r"(.{1,8}?)\1{9,}", regex.DOTALL)
"""A few characters, ten times or more."""
_RUN_CHARACTERS: Final = 40
_RUN_TOGETHER: Final = regex.compile(r"\p{Ll}{20,}")
"""Tokens of a broken model: 20 small letters in a row, which hardly a word has."""
_FEWEST_RUN_TOGETHER: Final = 3
_EAST_ASIAN: Final = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO"})
_OTHER_LANGUAGE: Final = regex.compile(
    r"\b(?:translat\w+|alphabets?|cyrillic|kanji|hiragana|katakana|russian|ukrainian|bulgarian|"
    r"serbian|macedonian|belarusian|kazakh|mongolian|chinese|mandarin|cantonese|japanese|korean|"
    r"arabic|persian|farsi|urdu|hebrew|yiddish|greek|hindi|sanskrit|bengali|tamil|telugu|marathi|"
    r"gujarati|punjabi|kannada|malayalam|nepali|sinhala|thai|lao|khmer|burmese|tibetan|armenian|"
    r"georgian|amharic)\b",
    regex.IGNORECASE,
)
"""A prompt that names one may ask for another script."""


def degeneracy(response: str, prompt: Prompt) -> Degeneracy | None:
    """Return what is wrong with a whole response; None: it is text in an expected script.

    Run together: at least three sequences of 20 and more small letters hold more than a third of
    all letters.

    Wrong script: more than a third of the letters are neither Latin nor of a script of the prompt,
    and the prompt names no language that is written in another one.
    """
    text = unicodedata.normalize("NFKC", response)
    words = _WORD.findall(text.casefold())
    if not words and "\ufffd" not in text:
        return "empty"
    if _loops(text.strip(), words):
        return "loop"
    if _run_together(text):
        return "run together"
    return "wrong script" if _foreign(text, f"{prompt.system or ''}\n{prompt.user}") else None


def repeated_share(words: Sequence[str]) -> float:
    """Return the share of the 4-grams of words that occurred before, 0 to below 1."""
    grams = [tuple(words[start : start + 4]) for start in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _loops(text: str, words: Sequence[str]) -> bool:
    longest = max((len(run[0]) for run in _RUN.finditer(text)), default=0)
    if longest >= max(_RUN_CHARACTERS, len(text) / 2):
        return True
    if len(words) < FEWEST_WORDS:
        return False
    return max(repeated_share(words), repeated_share(words[-TAIL_WORDS:])) > REPEATED


def _run_together(text: str) -> bool:
    runs = _RUN_TOGETHER.findall(text)
    letters = sum(map(str.isalpha, text))
    return len(runs) >= _FEWEST_RUN_TOGETHER and sum(map(len, runs)) > FOREIGN * letters


def _foreign(text: str, prompt: str) -> bool:
    if _OTHER_LANGUAGE.search(prompt):
        return False
    expected = {"LATIN", *_scripts(unicodedata.normalize("NFKC", prompt))}
    scripts = [*_scripts(text), *("UNREADABLE" for _ in range(text.count("\ufffd")))]
    foreign = sum(script not in expected for script in scripts)
    return foreign > FOREIGN * len(scripts)


def _scripts(text: str) -> list[str]:
    """The script of every letter; those of East Asia, which are mixed in writing, are one."""
    names = (unicodedata.name(letter, "UNREADABLE") for letter in text if letter.isalpha())
    scripts = (name.partition(" ")[0].partition("-")[0] for name in names)
    return ["CJK" if script in _EAST_ASIAN else script for script in scripts]
