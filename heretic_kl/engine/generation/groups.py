"""Response requests that one generation serves. Runs no model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heretic_kl.engine.generation.generate import Response, is_over
from heretic_kl.prompts import Prompt
from heretic_kl.requests import (
    PartialResponses,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    SoFar,
    StopRule,
)


@dataclass(frozen=True)
class ResponseGroup:
    """Requests for the same prompts and budget."""

    prompts: tuple[Prompt, ...]
    max_tokens: int
    rules: tuple[StopRule, ...]
    """Empty where one of the requests wants whole responses."""
    requests: tuple[ResponseRequest, ...] = ()

    @property
    def cost(self) -> int:
        """Tokens at most."""
        return len(self.prompts) * self.max_tokens

    def results(
        self, responses: Sequence[Response], decode: Callable[[Sequence[int]], str]
    ) -> dict[Request, Result]:
        """What the responses say to each request."""
        texts = tuple(decode(response.tokens) for response in responses)
        return dict.fromkeys(self.requests, ResponseResult(texts))

    def parts(
        self, responses: Sequence[Response], decode: Callable[[Sequence[int]], str]
    ) -> dict[Request, SoFar]:
        """What unfinished responses say to each request."""
        texts = tuple(decode(response.tokens) for response in responses)
        over = tuple(is_over(response, self.max_tokens) for response in responses)
        return dict.fromkeys(self.requests, PartialResponses(texts, over))


def response_groups(requests: Sequence[Request]) -> list[ResponseGroup]:
    """The response requests among requests, grouped, the cheapest group first."""
    by_key: dict[tuple[tuple[Prompt, ...], int], list[ResponseRequest]] = {}
    for request in requests:
        if isinstance(request, ResponseRequest):
            by_key.setdefault((request.prompts, request.max_tokens), []).append(request)
    groups = []
    for (prompts, max_tokens), members in by_key.items():
        rules = tuple(dict.fromkeys(r.stop for r in members if r.stop is not None))
        whole = any(request.stop is None for request in members)
        groups.append(ResponseGroup(prompts, max_tokens, () if whole else rules, tuple(members)))
    return sorted(groups, key=lambda group: group.cost)
