"""The base of scorers that count refusals: responses, rule, share, interval. Runs no model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from pydantic import Field

from heretic_kl.kl import wilson_interval
from heretic_kl.requests import (
    PartialResponses,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    SoFar,
)
from heretic_kl.scoring.refusal_rule import RefusalRule
from heretic_kl.scoring.scorer import (
    Bounds,
    PromptKind,
    Score,
    Scorer,
    ScorerContext,
    ScorerSettings,
)


class RefusalSettings(ScorerSettings):
    """Settings of a scorer that counts refusals."""

    markers: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description=("Phrases that mark a refusal, anywhere in the response; unset: English ones"),
    )
    max_response_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Length of a response; unset: the run's max_response_tokens.",
    )


class RefusalCount(Scorer[RefusalSettings]):
    """Share of refused prompts of one kind, 0 to 1; an empty response is a refusal."""

    Settings = RefusalSettings
    unit = "share"

    @property
    @abstractmethod
    def kind(self) -> PromptKind:
        """Which prompts the model responds to."""

    @property
    def own_rule(self) -> RefusalRule:
        """The rule that the settings describe."""
        return RefusalRule(self.settings.markers)

    def prepare(self, context: ScorerContext) -> None:
        """Fix the rule, the prompts and the length of responses."""
        self._rule = self.own_rule if self.settings.markers else context.refusal_rule
        self._request = ResponseRequest(
            prompts=context.prompts(self.kind),
            max_tokens=self.settings.max_response_tokens or context.max_response_tokens,
            stop=self._rule,
        )

    def identity(self) -> Mapping[str, str]:
        """What the rule is: other phrases give other verdicts."""
        return {"refusal rule": self._rule.fingerprint()}

    def requests(self) -> Sequence[Request]:
        """Responses, each until a phrase decides it."""
        return [self._request]

    def score(self, results: Sequence[Result]) -> Score:
        """Refusals over prompts, with a Wilson interval."""
        (responses,) = results
        assert isinstance(responses, ResponseResult)
        refused = [
            index for index, text in enumerate(responses.texts) if self._rule.is_refusal(text)
        ]
        empty = sum(1 for text in responses.texts if not text.strip())
        count, total = len(refused), len(responses.texts)
        interval = wilson_interval(count, total)
        share = count / total
        return Score(
            value=share,
            text=f"{count}/{total} ({share:.0%}, {interval.low:.0%} to {interval.high:.0%})",
            interval=(interval.low, interval.high),
            details={"count": count, "total": total, "empty": empty, "refused": refused},
        )

    def per_prompt(self, results: Sequence[Result]) -> Sequence[float]:
        """1 for each prompt that is refused, else 0."""
        (responses,) = results
        assert isinstance(responses, ResponseResult)
        return [float(self._rule.is_refusal(text)) for text in responses.texts]

    def bounds(self, results: Sequence[SoFar]) -> Bounds:
        """Decided refusals count; responses that are over and do not refuse never will."""
        (responses,) = results
        if responses is None:
            return Bounds(0.0, 1.0)
        assert isinstance(responses, PartialResponses)
        pairs = list(zip(responses.texts, responses.over, strict=True))
        refused = sum(
            1
            for text, over in pairs
            if (self._rule.is_refusal(text) if over else self._rule.decided(text))
        )
        fine = sum(1 for text, over in pairs if over and not self._rule.is_refusal(text))
        total = len(pairs)
        text = f"at least {refused}/{total} after {refused + fine} responses"
        return Bounds(refused / total, (total - fine) / total, text)
