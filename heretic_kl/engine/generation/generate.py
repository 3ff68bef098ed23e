"""Responses over a key-value cache, greedy or drawn; rows leave the batch when they are done.

Knows nothing about refusals or plans: edits are in force around the call, rules are given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.model import WHOLE, CausalModel, Decoding, Start
from heretic_kl.requests import Sampling, StopRule

COMPACT_SHARE = 0.125
"""Rows leave the cache once this share of those still in it is done; copying it has a cost."""


@dataclass
class Response:
    """The tokens of one response as it grows."""

    tokens: list[int] = field(default_factory=list)
    """The end token is not among them."""
    end_token: int | None = None
    """The stop token with which the model ended it; None: it did not."""
    decided: bool = False
    """All rules are decided; more tokens could not change a verdict."""

    @property
    def done(self) -> bool:
        """Nothing is to be added."""
        return self.decided or self.end_token is not None

    def reference_tokens(self, count: int) -> list[int]:
        """The first `count` tokens, the end token included: what teacher forcing feeds."""
        tail = [] if self.end_token is None else [self.end_token]
        return [*self.tokens, *tail][:count]


class ChosenTokens:
    """Which token comes next: the most likely one, or one drawn from the distribution.

    A row's draws depend on the seed and on its own sequence alone: neither other rows nor the
    size of batches change them, but for rounding.

    Without `sampling` it is the most likely token.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], sampling: Sampling | None) -> None:
        self._draws: list[torch.Generator] | None = None
        if sampling is not None:
            seeds = (_row_seed(sampling.seed, sequence) for sequence in sequences)
            self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """The next token of each of the rows, from its (rows, V) logits.

        Raises:
            MeasurementError: a row holds NaN or +inf, or only -inf.
        """
        if self._draws is None:
            best = logits.argmax(dim=-1)  # NaN is larger than all else
            _require_finite(logits.gather(-1, best[:, None]))
            return [int(token) for token in best.tolist()]
        drawn = [torch.rand((), generator=self._draws[row], dtype=torch.float64) for row in rows]
        wide = logits.to("cpu" if logits.device.type == "mps" else logits.device, torch.float64)
        cumulative = wide.softmax(dim=-1).cumsum(dim=-1)
        _require_finite(cumulative[:, -1])
        place = torch.stack(drawn).to(cumulative.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, place, right=True).squeeze(-1)
        return [int(token) for token in tokens.clamp_max(logits.shape[-1] - 1).tolist()]


@torch.no_grad()
def generate_responses(
    lm: CausalModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: int,
    rules: Sequence[StopRule] = (),
    *,
    chosen: ChosenTokens | None = None,
    start: Start = WHOLE,
    batch: int = 0,
    into: list[Response] | None = None,
    dropped: Callable[[], Collection[int]] | None = None,
) -> list[Response]:
    """Continue every sequence, by its most likely tokens unless told otherwise.

    Args:
        lm: the model, edited or not.
        sequences: token ids of the prompts, one batch.
        max_tokens: most tokens of a response.
        rules: a response stops once all of them are decided; none: it never stops early.
        chosen: which token comes next; None: the most likely one.
        start: which layers read the prompts, for which candidates in force.
        batch: which batch of the start's layer cache this is.
        into: empty responses that grow while this runs, as they are returned; None: new ones.
        dropped: asked for the candidates that need not go on, at the start and whenever a response
            is over.

    Returns:
        One response a sequence, in order; of several candidates, those of the first one first.
    """
    count, candidates = len(sequences), start.candidates
    responses = into or [Response() for _ in range(count * candidates)]
    out = set(dropped()) if dropped else set()
    if not sequences or max_tokens < 1 or len(out) == candidates:
        return responses
    state = Decoding(lm, sequences, max_tokens, start, batch)
    choose = chosen or ChosenTokens(sequences, None)
    while True:
        tokens = choose(state.logits, state.rows)
        news = False
        for row, token in zip(state.rows, tokens, strict=True):
            news |= _extend(lm, responses[row], token, max_tokens, rules)
        if news and dropped:
            out = set(dropped())
        leaving = [is_over(responses[row], max_tokens) or row // count in out for row in state.rows]
        if all(leaving):
            return responses
        if sum(leaving) >= max(1, COMPACT_SHARE * len(leaving)):
            staying = [index for index, leaves in enumerate(leaving) if not leaves]
            state.keep(staying)
            tokens = [tokens[index] for index in staying]
        state.advance(tokens)


@torch.no_grad()
def stream_response(
    lm: CausalModel,
    sequence: Sequence[int],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue one sequence, yielding text as it becomes final.

    Args:
        lm: the model, edited or not.
        sequence: token ids of the conversation.
        max_tokens: most tokens of the response.
        temperature: logits are divided by it and a token is drawn; 0: the most likely token.
        seed: of the numbers drawn, one a token; they do not depend on model or sequence.
    """
    state = Decoding(lm, [sequence], max_tokens)
    choose = ChosenTokens([()], Sampling(seed) if temperature else None)
    tokens: list[int] = []
    shown = ""
    for _ in range(max_tokens):
        (token,) = choose(state.logits / temperature if temperature else state.logits, [0])
        if token in lm.stop_ids:
            break
        tokens.append(token)
        text = lm.chat.decode(tokens)
        # A replacement character at the end is the first part of a character yet to come.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
        state.advance([token])


def _require_finite(values: Tensor) -> None:
    """Refuse what would look like a response: any token follows from NaN."""
    if not bool(values.isfinite().all()):
        raise MeasurementError("a response's logits hold NaN or +inf, or only -inf")


def _row_seed(seed: int, sequence: Sequence[int]) -> int:
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, sequence))}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def is_over(response: Response, max_tokens: int) -> bool:
    """Whether nothing is to be added to it."""
    return response.done or len(response.tokens) >= max_tokens


def _extend(
    lm: CausalModel,
    response: Response,
    token: int,
    max_tokens: int,
    rules: Sequence[StopRule],
) -> bool:
    """Add a token unless the response is over; whether it is over only now."""
    if is_over(response, max_tokens):
        return False
    if token in lm.stop_ids:
        response.end_token = token
    else:
        response.tokens.append(token)
        if rules:
            text = lm.chat.decode(response.tokens)
            response.decided = all(rule.decided(text) for rule in rules)
    return is_over(response, max_tokens)
