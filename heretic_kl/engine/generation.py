"""Answers over a key-value cache, greedy or drawn; rows leave the batch when they are done.

Knows nothing about refusals or plans: edits are in force around the call, rules are given.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heretic_kl.model import CausalModel, Lanes, PrefixCache, common_prefix, left_padded
from heretic_kl.requests import Sampling, StopRule

COMPACT_SHARE = 0.125
"""Rows leave the cache once this share of those still in it is done; copying it has a cost."""


@dataclass
class Answer:
    """The tokens of one answer as it grows."""

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

    Args:
        sequences: what the rows begin with.
        sampling: how to draw; None: the most likely token.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], sampling: Sampling | None) -> None:
        self._draws: list[torch.Generator] | None = None
        if sampling is not None:
            seeds = (_row_seed(sampling.seed, sequence) for sequence in sequences)
            self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """The next token of each of the rows, from its (rows, V) logits."""
        if self._draws is None:
            return [int(token) for token in logits.argmax(dim=-1).tolist()]
        drawn = [torch.rand((), generator=self._draws[row], dtype=torch.float64) for row in rows]
        wide = logits.to("cpu" if logits.device.type == "mps" else logits.device, torch.float64)
        cumulative = wide.softmax(dim=-1).cumsum(dim=-1)
        place = torch.stack(drawn).to(cumulative.device)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, place, right=True).squeeze(-1)
        return [int(token) for token in tokens.clamp_max(logits.shape[-1] - 1).tolist()]


@torch.no_grad()
def generate_answers(
    lm: CausalModel,
    sequences: Sequence[Sequence[int]],
    max_tokens: int,
    rules: Sequence[StopRule] = (),
    *,
    share_prefix: bool = True,
    chosen: ChosenTokens | None = None,
    lanes: Lanes | None = None,
    into: list[Answer] | None = None,
    dropped: Callable[[], Collection[int]] | None = None,
) -> list[Answer]:
    """Continue every sequence, by its most likely tokens unless told otherwise.

    Args:
        lm: the model, edited or not.
        sequences: token ids of the prompts, one batch.
        max_tokens: most tokens of an answer.
        rules: an answer is left where it stands once all of them are decided; none: never.
        share_prefix: run the tokens that all prompts begin with once.
        chosen: which token comes next; None: the most likely one.
        lanes: of K candidates in force by `edited_by_lane`; None: one candidate.
        into: empty answers that grow while this runs, as they are returned; None: new ones.
        dropped: asked for the candidates that need not go on, at the start and whenever an answer
            is over.

    Returns:
        One answer a sequence, in order; with lanes, those of the first candidate first.
    """
    choose = chosen or ChosenTokens(sequences, None)
    candidates = len(lanes.counts) if lanes else 1
    answers = into or [Answer() for _ in range(len(sequences) * candidates)]
    out = set(dropped()) if dropped else set()
    if not sequences or max_tokens < 1 or len(out) == candidates:
        return answers
    state = _Decoding(lm, sequences, share_prefix=share_prefix, lanes=lanes)
    for step in range(max_tokens):
        tokens = choose(state.logits(), state.rows)
        news = False
        for row, token in zip(state.rows, tokens, strict=True):
            if not answers[row].done:
                _append(lm, answers[row], token, rules)
                news = news or answers[row].done
        if step + 1 == max_tokens:
            break
        if news and dropped:
            out = set(dropped())
        done = [answers[row].done or row // len(sequences) in out for row in state.rows]
        if all(done):
            break
        if sum(done) >= max(1, COMPACT_SHARE * len(done)):
            state.keep([index for index, is_done in enumerate(done) if not is_done])
            tokens = [token for token, is_done in zip(tokens, done, strict=True) if not is_done]
        state.advance(tokens)
    return answers


@torch.no_grad()
def stream_answer(lm: CausalModel, sequence: Sequence[int], max_tokens: int) -> Iterator[str]:
    """Continue one sequence by its most likely tokens, yielding text as it becomes final."""
    state = _Decoding(lm, [sequence], share_prefix=False)
    tokens: list[int] = []
    shown = ""
    for _ in range(max_tokens):
        token = int(state.logits().argmax(dim=-1))
        if token in lm.stop_ids:
            break
        tokens.append(token)
        text = lm.chat.decode(tokens)
        # A replacement character at the end is the first part of a character yet to come.
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
        state.advance([token])


def _row_seed(seed: int, sequence: Sequence[int]) -> int:
    digest = hashlib.sha256(f"{seed}:{','.join(map(str, sequence))}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _append(lm: CausalModel, answer: Answer, token: int, rules: Sequence[StopRule]) -> None:
    if token in lm.stop_ids:
        answer.end_token = token
        return
    answer.tokens.append(token)
    if rules:
        text = lm.chat.decode(answer.tokens)
        answer.decided = all(rule.decided(text) for rule in rules)


class _Decoding:
    """One batch in the model's cache: which rows are in it and what comes next."""

    def __init__(
        self,
        lm: CausalModel,
        sequences: Sequence[Sequence[int]],
        *,
        share_prefix: bool,
        lanes: Lanes | None = None,
    ) -> None:
        count, candidates = len(sequences), 1 if lanes is None else len(lanes.counts)
        self.rows = list(range(count * candidates))
        self._lane_rows = count
        self._lanes = lanes
        self._lm = lm
        self._known = frozenset(inspect.signature(lm.model.forward).parameters)
        if lanes is not None:
            lanes.counts = [1] * candidates
        kept = PrefixCache(lm, common_prefix(sequences) if share_prefix else (), rows=candidates)
        if lanes is not None:
            lanes.counts = [count] * candidates
        self._cache: Any = kept.expanded(lm, count)
        tokens, own = left_padded([s[kept.length :] for s in sequences], lm.device)
        tokens, own = tokens.repeat(candidates, 1), own.repeat(candidates, 1)
        self._mask = torch.cat([own.new_ones(len(own), kept.length), own], dim=1)
        self._position = self._mask.sum(dim=1, keepdim=True)
        positions = (kept.length + own.cumsum(dim=1) - 1).clamp_min(kept.length)
        self._output = self._forward(tokens, positions)

    def logits(self) -> Tensor:
        """(rows, V) of the next token."""
        last: Tensor = self._output.logits[:, -1]
        return last

    def advance(self, chosen: Sequence[int]) -> None:
        """Feed one token to every row."""
        tokens = torch.tensor(chosen, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(chosen), 1)], dim=1)
        self._output = self._forward(tokens, self._position)
        self._position = self._position + 1

    def keep(self, indices: Sequence[int]) -> None:
        """Drop all other rows from the batch and its cache."""
        index = torch.tensor(indices, device=self._mask.device)
        self.rows = [self.rows[i] for i in indices]
        if self._lanes is not None:
            self._lanes.set_rows([row // self._lane_rows for row in self.rows])
        self._mask = self._mask[index]
        self._position = self._position[index]
        self._cache.reorder_cache(index)  # each layer moves the index to its own device

    def _forward(self, tokens: Tensor, positions: Tensor) -> Any:
        optional = {"position_ids": positions, "logits_to_keep": 1}
        return self._lm.model(
            input_ids=tokens,
            attention_mask=self._mask,
            past_key_values=self._cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in self._known},
        )
