"""A chat model behind an OpenAI-compatible server, as a judge.

Nothing that is raised or returned here holds the key, a response or an answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from heretic_kl.errors import ScorerError
from heretic_kl.judging.endpoint import Connection, ServedModel
from heretic_kl.judging.judgement import Judgement, Pair, Verdict
from heretic_kl.judging.question import Question


class ChatEndpoint(ServedModel):
    """A model of a server; see `heretic_kl.judging.ResponseJudge`."""

    role = "judge"
    failure = ScorerError
    hints = ("check key_variable", "check endpoint and model")

    @property
    def identity(self) -> str:
        """Nothing is known of the model but its name."""
        return self.name

    def judge(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `ResponseJudge.judge`; several requests at the same time.

        Raises:
            ScorerError: the server does not take the key, the model or the address.
        """
        return self.each(pairs, self._judged)

    def _judged(self, connection: Connection, pair: Pair) -> Judgement:
        """One response, asked about until there is a verdict or no retry is left."""
        question = Question(*pair)
        judgement = Judgement(None)
        for attempt in range(self.pace.retries + 1):
            message = {"role": "user", "content": question.text}
            reply = self.send(connection, "chat/completions", {"messages": [message]})
            answer = _Answer(problem=reply.problem, pause=reply.pause)
            if not reply.problem:
                answer = _read(reply.content, question)
            judgement = Judgement(
                answer.verdict,
                answer.problem,
                judgement.requests + 1,
                judgement.timeouts + reply.timed_out,
                judgement.prompt_tokens + answer.prompt_tokens,
                judgement.answer_tokens + answer.answer_tokens,
            )
            if not self.may_retry(connection, attempt, answer.pause):
                break
        return judgement


class _Answer(NamedTuple):
    """What one reply says."""

    verdict: Verdict | None = None
    problem: str = ""
    pause: float | None = None
    """As of a `Reply`."""
    prompt_tokens: int = 0
    answer_tokens: int = 0


def _read(content: bytes, question: Question) -> _Answer:
    """A verdict from the body of a reply with status 200."""
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        answer = choice["message"]["content"]
        usage = reply.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return _Answer(problem="a malformed reply", pause=0.0)
    counts = usage if isinstance(usage, dict) else {}
    paid = _Answer(
        prompt_tokens=_count(counts.get("prompt_tokens")),
        answer_tokens=_count(counts.get("completion_tokens")),
    )
    verdict = question.verdict(answer) if isinstance(answer, str) else None
    if verdict is not None:
        return paid._replace(verdict=verdict)
    cut = isinstance(choice, dict) and choice.get("finish_reason") == "length"
    problem = "an answer cut by max_tokens" if cut else "an answer that is no verdict"
    return paid._replace(problem=problem, pause=0.0)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
