"""Runs one frozen model under a plan and answers requests. Knows nothing about scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from heretic_kl.ablation import Plan, ResidualMean
from heretic_kl.engine.batching import length_buckets
from heretic_kl.engine.forcing import ForcedSequence, forced_hidden_states
from heretic_kl.engine.generation import Answer, greedy_answers
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import Head, RowStatistics, row_statistics
from heretic_kl.model import LanguageModel, common_prefix, edited, last_token_residuals
from heretic_kl.prompts import Prompt
from heretic_kl.requests import (
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    RowReduction,
    StopRule,
    TeacherForcedRequest,
    TeacherForcedResult,
)

MAX_LOGIT_ELEMENTS = 2**24
"""Logits of one model held at once: 64 MB in float32."""

T = TypeVar("T")


@dataclass(frozen=True)
class Reference:
    """The unedited model's greedy answers and what it computed while being fed them."""

    sequences: tuple[ForcedSequence, ...]
    hidden: Tensor
    """(rows, D) final hidden states, from the same pass as every candidate's."""
    head: Head
    """What makes logits of them."""

    def with_hidden(self, hidden: Tensor) -> Reference:
        """The same answers as another model sees them, to compare a third one with that."""
        return replace(self, hidden=hidden)

    @property
    def tokens(self) -> Tensor:
        """(rows,) the answer token that each row predicts."""
        return torch.tensor([token for s in self.sequences for token in s.answer])

    @property
    def prompt_index(self) -> Tensor:
        """(rows,) which sequence a row belongs to."""
        return torch.tensor([i for i, s in enumerate(self.sequences) for _ in s.answer])

    @property
    def position(self) -> Tensor:
        """(rows,) position in the answer, from 0."""
        return torch.tensor([n for s in self.sequences for n in range(len(s.answer))])


class Engine:
    """A frozen model that answers requests, under a plan or as it is.

    What the unedited model says is computed once and kept: its token ids and final hidden
    states, never its logits.

    Args:
        lm: the model.
        batch_size: most sequences in a batch; halved, and remembered, when memory runs out.
        notify: told, in words, when the batch size had to change.
        share_prefix: run the tokens that all prompts begin with once per candidate; see
            `heretic_kl.model.prefix_problem` for models that do not allow it.
        original: the engine of the unedited model, where `lm` is another model to be compared
            with it (a saved edit, say); `measure` then takes its references from there.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int,
        notify: Callable[[str], None] = lambda message: None,
        share_prefix: bool = True,
        original: Engine | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lm = lm
        self.batch_size = batch_size
        self.share_prefix = share_prefix
        self._notify = notify
        self._original = original
        self._encoded: dict[Prompt, tuple[int, ...]] = {}
        self._references: dict[tuple[tuple[Prompt, ...], int], Reference] = {}
        self._reference_answers: dict[tuple[Any, ...], list[Answer]] = {}

    def measure(self, plan: Plan | None, requests: Sequence[Request]) -> list[Result]:
        """Answer requests for one candidate.

        Equal requests run once, response requests for the same prompts and budget run as one,
        and cheap requests run before dear ones.

        Args:
            plan: the candidate; None: the unedited model, whose answers are kept.
            requests: what is asked.

        Returns:
            A result for each request, in order.
        """
        while True:
            size = self.batch_size
            results = self._measure(plan, requests)
            if self.batch_size == size:
                return [results[request] for request in requests]
            # Memory ran out and the batches changed: reference and candidate must have run in
            # the same ones, so both are measured again.

    def _measure(self, plan: Plan | None, requests: Sequence[Request]) -> dict[Request, Result]:
        forced = {r: None for r in requests if isinstance(r, TeacherForcedRequest)}
        asked = [r for r in requests if isinstance(r, ResponseRequest)]
        references = {r: self.reference(r.prompts, r.tokens) for r in forced}
        results: dict[Request, Result] = {}
        with nullcontext() if plan is None else edited(self.lm.architecture, plan):
            for request in sorted(forced, key=_forced_cost):
                results[request] = self._forced(request, references[request])
            groups = _response_groups(asked)
            for (prompts, max_tokens), rules in sorted(groups.items(), key=_response_cost):
                answers = self._answers(prompts, max_tokens, rules, unedited=plan is None)
                texts = tuple(self.lm.chat.decode(answer.tokens) for answer in answers)
                for question in asked:
                    if (question.prompts, question.max_tokens) == (prompts, max_tokens):
                        results[question] = ResponseResult(texts)
        return results

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compute the references of requests now, for instance before the model is edited."""
        for request in requests:
            if isinstance(request, TeacherForcedRequest):
                self.reference(request.prompts, request.tokens)

    def reference(self, prompts: tuple[Prompt, ...], tokens: int) -> Reference:
        """The unedited model's greedy answers of up to `tokens` tokens and their hidden states."""
        if self._original is not None:
            return self._original.reference(prompts, tokens)
        key = (prompts, tokens)
        if key not in self._references:
            answers = self._answers(prompts, tokens, (), unedited=True)
            sequences = tuple(
                ForcedSequence(self.encode(prompt), tuple(answer.reference_tokens(tokens)))
                for prompt, answer in zip(prompts, answers, strict=True)
            )
            hidden = self._hidden(sequences)
            self._references[key] = Reference(sequences, hidden, self.lm.head)
        return self._references[key]

    def hidden_states(self, plan: Plan | None, prompts: tuple[Prompt, ...], tokens: int) -> Tensor:
        """Final hidden states under a plan while being fed the unedited model's answers.

        Returns:
            (rows, D), rows ordered as in `reference(prompts, tokens)`.
        """
        sequences = self.reference(prompts, tokens).sequences
        with nullcontext() if plan is None else edited(self.lm.architecture, plan):
            return self._hidden(sequences)

    def residual_mean(self, prompts: Sequence[Prompt], winsorize_quantile: float) -> Tensor:
        """Mean residual after each layer at the last prompt token, (L, D) float64."""
        encoded = [self.encode(prompt) for prompt in prompts]
        prefix = common_prefix(encoded) if self.share_prefix else ()

        def collect() -> Tensor:
            mean = ResidualMean(winsorize_quantile)
            buckets = length_buckets([len(ids) for ids in encoded], self.batch_size)
            batches = ([encoded[i] for i in bucket] for bucket in buckets)
            for residuals in last_token_residuals(self.lm, batches, prefix):
                mean.add(residuals)
            return mean.mean

        return self._within_memory(collect)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, computed once."""
        if prompt not in self._encoded:
            self._encoded[prompt] = self.lm.chat.encode(prompt)
        return self._encoded[prompt]

    def answers(self, prompts: tuple[Prompt, ...], max_tokens: int) -> list[Answer]:
        """The unedited model's whole answers."""
        return self._answers(prompts, max_tokens, (), unedited=True)

    def _forced(self, request: TeacherForcedRequest, reference: Reference) -> TeacherForcedResult:
        hidden = self._hidden(reference.sequences)
        columns = reduce_rows(reference, hidden, self.lm.head, request.reduction)
        return TeacherForcedResult(columns, reference.prompt_index, reference.position)

    def _hidden(self, sequences: Sequence[ForcedSequence]) -> Tensor:
        return self._within_memory(
            lambda: forced_hidden_states(
                self.lm, sequences, self.batch_size, share_prefix=self.share_prefix
            )
        )

    def _answers(
        self,
        prompts: tuple[Prompt, ...],
        max_tokens: int,
        rules: tuple[StopRule, ...],
        unedited: bool,
    ) -> list[Answer]:
        key = (prompts, max_tokens, rules)
        if unedited and key in self._reference_answers:
            return self._reference_answers[key]
        encoded = [self.encode(prompt) for prompt in prompts]
        answers = self._within_memory(lambda: self._generate(encoded, max_tokens, rules))
        if unedited:
            self._reference_answers[key] = answers
        return answers

    def _generate(
        self, encoded: Sequence[Sequence[int]], max_tokens: int, rules: Sequence[StopRule]
    ) -> list[Answer]:
        answers: dict[int, Answer] = {}
        # Decoding costs a step of the whole model per token: full batches matter more than
        # a few padded positions.
        buckets = length_buckets([len(ids) for ids in encoded], self.batch_size, max_padding=1.0)
        for bucket in buckets:
            batch = [encoded[index] for index in bucket]
            done = greedy_answers(self.lm, batch, max_tokens, rules, share_prefix=self.share_prefix)
            answers.update(zip(bucket, done, strict=True))
        return [answers[index] for index in range(len(encoded))]

    def _within_memory(self, work: Callable[[], T]) -> T:
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                if self.batch_size == 1:
                    raise MeasurementError(
                        "out of memory with a single prompt: use shorter prompts, fewer "
                        "--kl-tokens or a larger device"
                    ) from error
            # Outside the handler, so that the failed attempt's tensors are free.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.batch_size = max(1, self.batch_size // 2)
            self._references.clear()
            self._notify(f"out of memory: batch size is now {self.batch_size}")


def reduce_rows(
    reference: Reference,
    hidden: Tensor,  # (rows, D) of the candidate
    head: Head,
    reduction: RowReduction,
) -> tuple[Tensor, ...]:
    """Columns of a reduction over all rows, the heads applied to chunks of rows."""
    tokens = reference.tokens.to(hidden.device)
    step = max(1, MAX_LOGIT_ELEMENTS // head.vocabulary)
    parts = [
        reduction(
            reference.head.logits(reference.hidden[start : start + step]),
            head.logits(hidden[start : start + step]),
            tokens[start : start + step],
        )
        for start in range(0, hidden.shape[0], step)
    ]
    joined = [torch.cat(columns).cpu() for columns in zip(*parts, strict=True)]
    kind = type(parts[0])
    return kind(joined) if kind is tuple else kind(*joined)


def mean_kl(reference: Reference, hidden: Tensor, head: Head) -> float:
    """Forward KL in nats between two sets of hidden states, mean over positions, then prompts."""
    columns = reduce_rows(reference, hidden, head, row_statistics)
    assert isinstance(columns, RowStatistics)
    index = reference.prompt_index
    count = torch.bincount(index).clamp_min(1)
    total = torch.zeros(len(count), dtype=torch.float64).index_add(0, index, columns.divergence)
    return float((total / count).mean())


def _response_groups(
    requests: Sequence[ResponseRequest],
) -> dict[tuple[tuple[Prompt, ...], int], tuple[StopRule, ...]]:
    """Rules by (prompts, budget); no rules where one request wants whole answers."""
    groups: dict[tuple[tuple[Prompt, ...], int], tuple[StopRule, ...]] = {}
    whole = {(r.prompts, r.max_tokens) for r in requests if r.stop is None}
    for request in requests:
        key = (request.prompts, request.max_tokens)
        rules = groups.get(key, ())
        if request.stop is not None and key not in whole and request.stop not in rules:
            rules = (*rules, request.stop)
        groups[key] = rules
    return groups


def _forced_cost(request: TeacherForcedRequest) -> int:
    return len(request.prompts) * request.tokens


def _response_cost(item: tuple[tuple[tuple[Prompt, ...], int], tuple[StopRule, ...]]) -> int:
    (prompts, max_tokens), _rules = item
    return len(prompts) * max_tokens
