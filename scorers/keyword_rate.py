"""How often responses use phrases from a list: overused phrases, hedging, disclaimers."""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field

from heretic_kl.kl import mean_estimate
from heretic_kl.prompts import Prompt, fingerprint
from heretic_kl.scoring import (
    Meaning,
    PromptKind,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    Score,
    Scorer,
    ScorerContext,
    ScorerSettings,
    degeneracy,
)

OVERUSED = (
    *("a testament to", "tapestry", "a symphony of", "dance of", "bustling", "nestled"),
    *("delve", "embark", "journey", "whisper", "shiver", "a mix of", "a sense of"),
    *("in the heart of", "little did", "couldn't help but", "hung heavy", "echoed"),
    *("shimmer", "ethereal", "intricate", "vibrant", "once upon a time"),
)
"""Phrases that language models like in stories; a word that begins with one counts."""
NAMED = 6
"""So many phrases are named in a model card."""


class KeywordRateSettings(ScorerSettings):
    """Settings of the keyword rate."""

    phrases: tuple[Annotated[str, Field(pattern=r"\S")], ...] = Field(
        default=OVERUSED,
        min_length=1,
        description="Phrases that count, wherever a word begins with one; case and quotes aside",
    )
    prompts: PromptKind = Field(
        default="harmful", description="Kind of prompts: harmful are those that draw the behaviour"
    )
    max_response_tokens: int | None = Field(
        default=None, ge=1, description="Length of a response; unset: the run's"
    )


class KeywordRate(Scorer[KeywordRateSettings]):
    """Phrases per 100 words of a response, mean over prompts.

    A degenerate response (empty, a loop, no words) counts as one phrase in one word, 100 per
    100 words, or as no phrase where the rate is maximized: it is no success.
    """

    Settings = KeywordRateSettings
    unit = "per 100 words"

    def prepare(self, context: ScorerContext) -> None:
        """Choose the prompts, and compile the phrases."""
        self._degenerate_rate = 0.0 if context.role == "maximize" else 100.0
        self._request = ResponseRequest(
            context.prompts(self.settings.prompts),
            self.settings.max_response_tokens or context.max_response_tokens,
        )
        phrases = sorted({_normalized(phrase) for phrase in self.settings.phrases})
        self._pattern = re.compile(
            "|".join(rf"(?<!\w){re.escape(phrase)}" for phrase in phrases[::-1])
        )

    def meaning(self) -> Meaning:
        """Phrases, the first of them by name."""
        first, count = self.settings.phrases[:NAMED], len(self.settings.phrases)
        named = ", ".join(f'"{phrase.strip()}"' for phrase in first)
        rest = f" and {count - NAMED} more" if count > NAMED else ""
        return Meaning(
            f"phrases of a list per 100 words of a response: {named}{rest}",
            "Listed phrases count, whatever they mean where they stand; the same thing in other "
            "words does not. A degenerate response counts as nothing but such phrases where they "
            "are minimized: it is no success.",
        )

    def identity(self) -> Mapping[str, str]:
        """What the prompts are: a file of the same name may hold others tomorrow."""
        return {"prompts": fingerprint(self._request.prompts)}

    def requests(self) -> Sequence[Request]:
        """Whole responses."""
        return [self._request]

    def per_prompt(self, results: Sequence[Result]) -> Sequence[float]:
        """Phrases per 100 words of each response."""
        (responses,) = results
        assert isinstance(responses, ResponseResult)
        pairs = zip(responses.texts, self._request.prompts, strict=True)
        return [self._rate(text, prompt) for text, prompt in pairs]

    def score(self, results: Sequence[Result]) -> Score:
        """The mean rate with its interval, clustered by prompt."""
        rates = torch.tensor(self.per_prompt(results), dtype=torch.float64)
        estimate = mean_estimate(rates)
        return Score(
            value=estimate.mean,
            text=f"{estimate.text(2)} per 100 words",
            standard_error=estimate.standard_error,
            interval=estimate.interval,
            details={"with_phrases": int((rates > 0).sum()), "prompts": len(rates)},
        )

    def _rate(self, text: str, prompt: Prompt) -> float:
        if degeneracy(text, prompt) is not None:
            return self._degenerate_rate
        return 100 * len(self._pattern.findall(_normalized(text))) / len(text.split())


def _normalized(text: str) -> str:
    """Lower case, straight quotes, single blanks."""
    return " ".join(text.lower().replace("\u2019", "'").split())
