"""The contract of a scorer plug-in. Knows nothing about models, studies or terminals.

A plug-in is one file with one settings class and one scorer class:

    class MySettings(ScorerSettings):
        limit: int = Field(default=10, ge=1, description="What it limits.")

    class MyScorer(Scorer[MySettings]):
        Settings = MySettings

        def prepare(self, context): ...    # once a study: choose prompts, ask the reference
        def requests(self): ...            # what it needs of every candidate
        def score(self, results): ...      # from the results to one Score
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict

from heretic_kl.kl import wilson_interval
from heretic_kl.prompts import Kind, Prompt
from heretic_kl.requests import Request, Result, SoFar
from heretic_kl.scoring.refusal_rule import RefusalRule

PromptKind: TypeAlias = Kind
Role = Literal["minimize", "maximize", "monitor"]
"""`monitor` scorers are measured for the trials that are tested, and shown; they steer nothing."""


class ScorerSettings(BaseModel):
    """Base of every scorer's settings: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SettingsT = TypeVar("SettingsT", bound=ScorerSettings)


@dataclass(frozen=True)
class ScorerContext:
    """What a scorer may ask while it prepares."""

    prompts_by_kind: Mapping[PromptKind, tuple[Prompt, ...]]
    """Of the use being measured."""
    ask_reference: Callable[[Request], Result]
    """Gives the reference's result of a request."""
    kl_tokens: int
    """The run's number of scored positions N."""
    max_response_tokens: int
    """The run's budget of response tokens."""
    noise_floor: float | None = None
    """KL in nats that an unchanged model shows; None where it was not measured."""
    refusal_rule: RefusalRule = field(default_factory=RefusalRule)
    """The run's rule, from the settings of the scorer that counts refusals."""
    refusal_openers: tuple[int, ...] = ()
    """Tokens with which the reference's refusals begin; empty where it refuses nothing."""
    use: Literal["validation", "test"] = "validation"
    """Whether trials or final trials are to be measured."""
    role: Role = "minimize"
    """Of the scorer that prepares: what is no answer at all must not look like a success."""

    def prompts(self, kind: PromptKind) -> tuple[Prompt, ...]:
        """The prompts of the use being measured."""
        return self.prompts_by_kind[kind]


@dataclass(frozen=True)
class Meaning:
    """What a score is about, in words for a model card."""

    counts: str = ""
    """What the value is a share or a mean of: `responses that refuse`. "": not said."""
    limits: str = ""
    """In which cases it counts wrongly, in whole sentences. "": not said."""
    about: Literal["refusals", "behaviour", "damage"] = "behaviour"
    """Refusals, another behaviour that an edit may remove, or what the edit costs."""


LIKELY_LEVEL = 0.6
"""Of the two-sided interval whose upper end is a one-sided limit with a confidence of 80%."""
LIKELY = 0.8416 / 1.9600
"""From a value to the upper end of its 95% interval, how far a one-sided confidence of 80% reaches
(quantiles of the normal distribution)."""


@dataclass(frozen=True)
class Score:
    """What a scorer found for one candidate."""

    value: float | None
    """In the scorer's unit; None: unscored, the trial counts as failed if this was an objective."""
    text: str
    """For people, with its error: `3/64 (5%, 2% to 13%)`."""
    objective: float | None = None
    """What the optimizer sees where it differs from `value`."""
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    """95%."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Further figures, JSON-ready."""
    per_prompt: tuple[float, ...] | None = None
    """What `Scorer.per_prompt` gave; None: nothing, or the values were not kept."""

    @property
    def optimized(self) -> float | None:
        """The objective if there is one, else the value."""
        return self.value if self.objective is None else self.objective

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, for storage."""
        content = {**vars(self), "interval": self.interval and list(self.interval)}
        values = content.pop("per_prompt")
        return content if values is None else {**content, "per_prompt": list(values)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """The inverse of `to_dict`."""
        interval, values = data["interval"], data.get("per_prompt")
        return cls(
            **{
                **data,
                "interval": interval and (float(interval[0]), float(interval[1])),
                "per_prompt": None if values is None else tuple(map(float, values)),
            }
        )

    def without_prompts(self) -> Score:
        """The same without a value for each prompt."""
        return replace(self, per_prompt=None)


def likely_value(score: Score) -> float | None:
    """What the measured quantity is below with a one-sided confidence of 80%.

    By Wilson's interval where the score is a share whose details tell `count` and `total`, else
    by a part of the score's own interval.
    """
    if score.value is None or score.interval is None:
        return score.value
    count, total = score.details.get("count"), score.details.get("total")
    if isinstance(count, int) and total and score.value == count / total:
        return wilson_interval(count, total, LIKELY_LEVEL).high
    return score.value + LIKELY * (score.interval[1] - score.value)


class Bounds(NamedTuple):
    """Between what a score will lie for sure, whatever is still to be measured."""

    low: float = -math.inf
    """Of `Score.optimized`, in the scorer's unit."""
    high: float = math.inf
    text: str = ""
    """For people: `at least 12/40 after 24 prompts`."""


class Scorer(ABC, Generic[SettingsT]):
    """Measures one thing about a candidate, from the results of requests it declared.

    Args:
        name: what the config calls it; also the name of its score.
        settings: its own validated settings.
    """

    Settings: ClassVar[type[ScorerSettings]] = ScorerSettings
    """The class that validates the scorer's settings table."""
    unit: ClassVar[str] = ""
    """Of the value, for instance `nats`."""

    def __init__(self, name: str, settings: SettingsT) -> None:
        self.name = name
        self.settings = settings

    def check(self) -> None:  # noqa: B027 (optional by design)
        """Called before a model is loaded: raise for what is wrong by then, such as no server.

        Raises:
            HereticKLError: one line that names the setting.
        """

    def prepare(self, context: ScorerContext) -> None:  # noqa: B027 (optional by design)
        """Called once before any candidate: pick prompts, ask the reference what is needed."""

    def identity(self) -> Mapping[str, str]:
        """What its scores depend on beyond code and settings, such as the content of own files.

        Asked after `prepare`. A study is continued only where all of it is the same.
        """
        return {}

    def meaning(self) -> Meaning:
        """What is counted, for the card of a saved model; asked without `prepare`."""
        return Meaning()

    def verdicts(self, results: Sequence[Result]) -> Sequence[str | None] | None:
        """A judge's verdict on each prompt's response, for the log of responses; None: no judge."""
        return None

    def judging(self) -> Mapping[str, Any]:
        """What a judge behind a server was asked so far, to be summed over a run.

        `by` names the judge; `requests`, `retries`, `timeouts`, `prompt_tokens`, `answer_tokens`
        and `cost` are numbers. Empty: nobody is asked.
        """
        return {}

    @abstractmethod
    def requests(self) -> Sequence[Request]:
        """What is needed of every candidate; the same each time it is called."""

    @abstractmethod
    def score(self, results: Sequence[Result]) -> Score:
        """The score, from one result for each request, in order."""

    def per_prompt(self, results: Sequence[Result]) -> Sequence[float] | None:
        """One value for each prompt, in order, whose mean is the score's value.

        Kept with the score, so that trials are compared prompt by prompt. None: the score is no
        such mean.
        """
        return None

    def bounds(self, results: Sequence[SoFar]) -> Bounds:
        """What is sure of the score before all results are there.

        Asked only where the search stops measuring candidates that are surely beaten (`racing`).
        A scorer that leaves this out is measured whole. Never a guess.

        Each request's entry is a result, a part of one (`PartialRows`, `PartialResponses`) or None
        where nothing is there yet; not all of them are results.
        """
        return Bounds()
