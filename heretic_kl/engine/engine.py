"""Runs one frozen model under a plan and answers requests. Knows nothing about scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from heretic_kl.ablation import Plan, ResidualMean
from heretic_kl.engine.batching import length_buckets
from heretic_kl.engine.generation.cache_check import continuing
from heretic_kl.engine.generation.candidates import CandidateResponses
from heretic_kl.engine.generation.generate import Response
from heretic_kl.engine.progress import Progress
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.teacher_forcing.requests import (
    BatchesChanged,
    ForcedKey,
    ForcedRequests,
    forced_keys,
)
from heretic_kl.engine.teacher_forcing.tree_check import tree_problem
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import Reference
from heretic_kl.model import LanguageModel, common_prefix, last_token_residuals
from heretic_kl.prompts import Prompt
from heretic_kl.requests import (
    PartialResponses,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    Sampling,
    SoFar,
    StopRule,
    TeacherForcedRequest,
    Watch,
)

_ResponsesKey: TypeAlias = tuple[tuple[Prompt, ...], int, tuple[StopRule, ...]]


MOST_CANDIDATES = 64
"""Side by side, until memory runs out."""


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
        trees: lay out what is teacher-forced as trees of tokens, which share all that some
            sequences begin with, unless there is a `tree_problem`; an original decides for both.
        original: the engine of the unedited model, where `lm` is another model to be compared
            with it (a saved edit, say); `measure` then takes its references from there.
        trunk_bytes: memory, in all, for what the unedited model computes and candidates need: its
            states below the edited layers, where candidates then start, and its logits; 0: all of
            it is computed for every candidate.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        batch_size: int,
        notify: Callable[[str], None] = lambda message: None,
        share_prefix: bool = True,
        trees: bool = True,
        original: Engine | None = None,
        cache_bytes: int = 0,
    ) -> None:
        self.lm = lm
        # Now, as `continuing`: later an edit may be in force.
        trees = original.trees if original is not None else trees and tree_problem(lm) is None
        self.runner: Runner = Runner(
            lm,
            batch_size,
            share_prefix=share_prefix,
            trees=trees,
            notify=notify,
        )
        continuing(lm)
        self._encoded: dict[Prompt, tuple[int, ...]] = {}
        self._reference_responses: dict[_ResponsesKey, list[Response]] = {}
        self._responding: dict[_ResponsesKey, CandidateResponses] = {}
        self._cache_bytes = 0 if original is not None else cache_bytes
        self._notify = notify
        self._most_candidates = MOST_CANDIDATES
        self._forced: ForcedRequests = ForcedRequests(
            self.runner,
            lm,
            self.encode,
            original=None if original is None else original._forced,
            left=self._bytes_left,
            notify=notify,
        )

    @property
    def batch_size(self) -> int:
        """Most sequences in a batch, as memory has allowed so far."""
        return self.runner.batch_size

    @property
    def share_prefix(self) -> bool:
        """Whether the tokens that all prompts begin with run once."""
        return self.runner.share_prefix

    @property
    def trees(self) -> bool:
        """Whether what is teacher-forced runs as trees of tokens."""
        return self.runner.trees

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
        (results,) = self.measure_many([plan], requests)
        assert results is not None  # nobody watches
        return results

    def measure_many(
        self,
        plans: Sequence[Plan | None],
        requests: Sequence[Request],
        watch: Watch | None = None,
    ) -> list[list[Result] | None]:
        """Answer requests for K candidates, side by side as far as memory allows.

        Args:
            plans: the candidates.
            requests: what is asked of each.
            watch: asked, whenever more is known of a candidate, whether it need go on. Of
                several candidates in one teacher-forced pass none leaves it.

        Returns:
            For each candidate, in order, what `measure` would return, equal to it within the
            noise floor; None where `watch` ended it.
        """
        results: list[list[Result] | None] = []
        while len(results) < len(plans):
            first = len(results)
            group = plans[first : first + self._most_candidates]
            own = None if watch is None else _counted_from(first, watch)
            try:
                results += self._measure_steadily(group, requests, own)
                continue
            except torch.OutOfMemoryError as error:
                if len(group) == 1:
                    raise MeasurementError(
                        "out of memory with a single candidate: lower --cache-memory-mb or "
                        "--batch-size"
                    ) from error
            # Outside the handler, so that the failed attempt's tensors are free.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._most_candidates = max(1, len(group) // 2)
            self._notify(f"out of memory: {self._most_candidates} candidates run at once now")
        return results

    def _measure_steadily(
        self, plans: Sequence[Plan | None], requests: Sequence[Request], watch: Watch | None
    ) -> list[list[Result] | None]:
        while True:
            size = self.batch_size
            try:
                results = self._measure(plans, requests, watch)
            except BatchesChanged:
                continue
            if self.batch_size == size:
                return results
            # Memory ran out and the batches changed: reference and candidate must have run in
            # the same ones, so both are measured again.

    def _measure(
        self, plans: Sequence[Plan | None], requests: Sequence[Request], watch: Watch | None
    ) -> list[list[Result] | None]:
        progress = Progress(requests, len(plans), watch)
        forced = _distinct_forced(requests)
        if forced:
            self._forced.measure(forced, plans, progress)
        asked = [r for r in requests if isinstance(r, ResponseRequest)]
        for group in sorted(_response_groups(asked), key=_response_cost):
            if progress.going:
                self._respond(group, plans, progress)
        return progress.results()

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compute the references of requests now, for instance before the model is edited."""
        forced = _distinct_forced(requests)
        if forced:
            self._forced.references(forced_keys(forced))

    def reference(
        self, prompts: tuple[Prompt, ...], tokens: int, sampling: Sampling | None = None
    ) -> Reference:
        """The unedited model's answers of up to `tokens` tokens and its states over them."""
        (found,) = self._forced.references([ForcedKey(prompts, tokens, sampling)])
        return found

    def release(self) -> None:
        """Give back the memory of what is kept; it is computed anew when it is needed."""
        self._forced.release()
        for responding in self._responding.values():
            responding.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def reference_under(
        self, plan: Plan | None, prompts: tuple[Prompt, ...], tokens: int
    ) -> Reference:
        """`reference(prompts, tokens)` with the hidden states of a plan, from the same batches."""
        while True:
            size, reference = self.batch_size, self.reference(prompts, tokens)
            hidden = self.hidden_states(plan, prompts, tokens)
            if self.batch_size == size:
                return reference.with_hidden(hidden)

    def hidden_states(self, plan: Plan | None, prompts: tuple[Prompt, ...], tokens: int) -> Tensor:
        """Final hidden states under a plan while being fed the unedited model's greedy answers.

        Returns:
            (rows, D), rows ordered as in `reference(prompts, tokens)`.
        """
        return self.hidden_states_of([plan], prompts, tokens)[0]

    def hidden_states_of(
        self, plans: Sequence[Plan | None], prompts: tuple[Prompt, ...], tokens: int
    ) -> Tensor:
        """The same of K candidates side by side, (K, rows, D)."""
        return self._forced.passes(ForcedKey(prompts, tokens)).hidden_states(plans)

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

        return self.runner.within_memory(collect)

    def residuals(self, prompts: Sequence[Prompt]) -> Tensor:
        """Residual after each layer at the last prompt token, (P, L, D) float32, in order."""
        encoded = [self.encode(prompt) for prompt in prompts]
        prefix = common_prefix(encoded) if self.share_prefix else ()

        def collect() -> Tensor:
            buckets = length_buckets([len(ids) for ids in encoded], self.batch_size)
            batches = ([encoded[i] for i in bucket] for bucket in buckets)
            rows = torch.cat(list(last_token_residuals(self.lm, batches, prefix)))
            order = torch.tensor([index for bucket in buckets for index in bucket])
            return rows[order.argsort()]

        return self.runner.within_memory(collect)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, computed once."""
        if prompt not in self._encoded:
            self._encoded[prompt] = self.lm.chat.encode(prompt)
        return self._encoded[prompt]

    def responses(self, prompts: tuple[Prompt, ...], max_tokens: int) -> list[Response]:
        """The unedited model's whole answers."""
        return self._responses(prompts, max_tokens, ())

    def _bytes_left(self) -> int:
        """What is left of the common budget for what the unedited model computes."""
        taken = self._forced.bytes
        taken += sum(responding.cache_bytes for responding in self._responding.values())
        return self._cache_bytes - taken

    def _respond(
        self, group: _ResponseGroup, plans: Sequence[Plan | None], progress: Progress
    ) -> None:
        going = tuple(progress.going)
        chosen = [plans[candidate] for candidate in going]

        def hear(responses: Sequence[Sequence[Response]]) -> list[int]:
            """Lanes that need not go on."""
            return [
                slot
                for slot, own in enumerate(responses)
                if not progress.hear(going[slot], group.parts(own, self.lm.chat.decode))
            ]

        if chosen == [None]:
            responses = [self._responses(group.prompts, group.max_tokens, group.rules)]
        else:
            responding = self._candidate_responses(group)
            responses = responding.responses(chosen, hear if progress.watched else None)
        for slot, candidate in enumerate(going):
            if candidate in progress.going:
                progress.keep(candidate, group.results(responses[slot], self.lm.chat.decode))

    def _candidate_responses(self, group: _ResponseGroup) -> CandidateResponses:
        key = (group.prompts, group.max_tokens, group.rules)
        if key not in self._responding:
            self._responding[key] = CandidateResponses(
                self.runner,
                self.lm.architecture,
                [self.encode(prompt) for prompt in group.prompts],
                group.max_tokens,
                group.rules,
                cache_bytes=self._bytes_left,
                notify=self._notify,
            )
        return self._responding[key]

    def _responses(
        self, prompts: tuple[Prompt, ...], max_tokens: int, rules: tuple[StopRule, ...]
    ) -> list[Response]:
        """The unedited model's, kept."""
        key = (prompts, max_tokens, rules)
        if key not in self._reference_responses:
            encoded = [self.encode(prompt) for prompt in prompts]
            self._reference_responses[key] = self.runner.responses(encoded, max_tokens, rules)
        return self._reference_responses[key]


@dataclass(frozen=True)
class _ResponseGroup:
    """Requests for the same prompts and budget: one generation answers them all."""

    prompts: tuple[Prompt, ...]
    max_tokens: int
    rules: tuple[StopRule, ...]
    """Empty where one of the requests wants whole answers."""
    requests: tuple[ResponseRequest, ...]

    def results(
        self, responses: Sequence[Response], decode: Callable[[Sequence[int]], str]
    ) -> dict[Request, Result]:
        """What the answers say to each request."""
        texts = tuple(decode(response.tokens) for response in responses)
        return dict.fromkeys(self.requests, ResponseResult(texts))

    def parts(
        self, responses: Sequence[Response], decode: Callable[[Sequence[int]], str]
    ) -> dict[Request, SoFar]:
        """What unfinished answers say to each request."""
        texts = tuple(decode(response.tokens) for response in responses)
        over = tuple(
            response.done or len(response.tokens) >= self.max_tokens for response in responses
        )
        return dict.fromkeys(self.requests, PartialResponses(texts, over))


def _response_groups(requests: Sequence[ResponseRequest]) -> list[_ResponseGroup]:
    by_key: dict[tuple[tuple[Prompt, ...], int], list[ResponseRequest]] = {}
    for request in requests:
        by_key.setdefault((request.prompts, request.max_tokens), []).append(request)
    groups = []
    for (prompts, max_tokens), own in by_key.items():
        rules = tuple(dict.fromkeys(r.stop for r in own if r.stop is not None))
        whole = any(request.stop is None for request in own)
        groups.append(_ResponseGroup(prompts, max_tokens, () if whole else rules, tuple(own)))
    return groups


def _distinct_forced(requests: Sequence[Request]) -> list[TeacherForcedRequest]:
    return list(dict.fromkeys(r for r in requests if isinstance(r, TeacherForcedRequest)))


def _response_cost(group: _ResponseGroup) -> int:
    return len(group.prompts) * group.max_tokens


def _counted_from(first: int, watch: Watch) -> Watch:
    """The same watch for candidates that are counted from another one on."""
    return lambda candidate, known: watch(first + candidate, known)
