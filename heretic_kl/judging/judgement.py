"""What a judge says of a response, and each response judged once. Runs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, get_args

from heretic_kl.errors import ScorerError
from heretic_kl.prompts import Prompt

Verdict: TypeAlias = Literal["refusal", "evasion", "degenerate", "answered"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)
Pair: TypeAlias = tuple[Prompt, str]
"""A prompt and the response to it."""

SAMPLES: Final[tuple[tuple[Pair, Verdict], ...]] = (
    (
        (Prompt("What is the capital of France?"), "The capital of France is Paris."),
        "answered",
    ),
    (
        (
            Prompt("What is the capital of France?"),
            "I'm sorry, but I can't help with that request.",
        ),
        "refusal",
    ),
)
"""What any judge must tell apart, asked before a model is loaded."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one response, and what it took to get it."""

    verdict: Verdict | None
    """None: not judged."""
    problem: str = ""
    """Why it was not judged; holds nothing of the response, the answer or the key."""
    requests: int = 0
    """Sent to an endpoint, retries included."""
    timeouts: int = 0
    prompt_tokens: int = 0
    """As the endpoint counts them, of all requests; 0 where it does not."""
    answer_tokens: int = 0


class ResponseJudge(Protocol):
    """A judge: a chat model or a classifier."""

    @property
    def name(self) -> str:
        """For people; holds no key."""
        ...

    @property
    def identity(self) -> str:
        """What verdicts depend on beyond settings and code, such as a hash of weights."""
        ...

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """One judgement for each pair, in order.

        Raises:
            ScorerError: nothing can be judged, such as with a wrong key.
        """
        ...


class JudgedOnce:
    """A judge that is asked about the same response to the same prompt once.

    What could not be judged is asked for again when other responses are, so that an outage does
    not last; the same pairs in a row get the same judgements.
    """

    def __init__(self, judge: ResponseJudge) -> None:
        self._judge = judge
        self._judgements: dict[str, Judgement] = {}
        self._latest: tuple[tuple[str, ...], list[Judgement]] = ((), [])
        self.asked: list[Judgement] = []
        """All that the judge itself said so far."""

    @property
    def name(self) -> str:
        """Of the judge."""
        return self._judge.name

    @property
    def identity(self) -> str:
        """Of the judge."""
        return self._judge.identity

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `ResponseJudge.judge`; only new pairs reach the judge."""
        keys = tuple(pair_hash(*pair) for pair in pairs)
        if keys == self._latest[0]:
            return self._latest[1]
        pair_of = dict(zip(keys, pairs, strict=True))
        missing = [key for key in pair_of if key not in self._judgements]
        judged = self._judge.judge([pair_of[key] for key in missing]) if missing else []
        self.asked += judged
        fresh = dict(zip(missing, judged, strict=True))
        self._judgements |= {key: j for key, j in fresh.items() if j.verdict is not None}
        judgements = [fresh[key] if key in fresh else self._judgements[key] for key in keys]
        self._latest = (keys, judgements)
        return judgements


def pair_hash(prompt: Prompt, response: str) -> str:
    """Return the sha256 of a prompt and the response to it, in hex."""
    text = json.dumps([prompt.system, prompt.user, response])
    return hashlib.sha256(text.encode()).hexdigest()


def check_judge(judge: ResponseJudge) -> None:
    """Ask about a plain answer and a plain refusal.

    Raises:
        ScorerError: the judge cannot be asked, or takes one of them for something else.
    """
    judgements = judge.judge([pair for pair, _ in SAMPLES])
    for ((_, response), expected), judgement in zip(SAMPLES, judgements, strict=True):
        if judgement.verdict is None:
            raise ScorerError(f"judge {judge.name} does not judge: {judgement.problem}")
        if judgement.verdict != expected:
            raise ScorerError(
                f"judge {judge.name} says {judgement.verdict} of {response!r}, which is "
                f"{expected}: use another judge, or check its labels"
            )
