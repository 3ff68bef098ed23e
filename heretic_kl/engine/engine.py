"""Runs one frozen model under a plan and answers requests. Knows nothing about scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from heretic_kl.ablation import Plan, ResidualMean
from heretic_kl.engine.candidate_results import Progress
from heretic_kl.engine.generation.candidates import CandidateResponses
from heretic_kl.engine.generation.generate import Response
from heretic_kl.engine.generation.groups import ResponseGroup, response_groups
from heretic_kl.engine.length_buckets import length_buckets
from heretic_kl.engine.memory_limits import MemoryLimits
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.shared import SharedResults
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import run_forced
from heretic_kl.engine.teacher_forcing.requests import ForcedKey, ForcedRequests, forced_keys
from heretic_kl.kl import Reference
from heretic_kl.model import (
    Decoding,
    LanguageModel,
    common_prefix,
    edited,
    last_token_residuals,
)
from heretic_kl.model.placement import offload
from heretic_kl.prompts import Prompt
from heretic_kl.requests import (
    ModelRequest,
    ModelResult,
    Request,
    Result,
    StopRule,
    TeacherForcedRequest,
    Watch,
)

_ResponsesKey: TypeAlias = tuple[tuple[Prompt, ...], int, tuple[StopRule, ...]]


class Engine:
    """A frozen model that answers requests, under a plan or as it is.

    What the unedited model says is computed once and kept: its token ids and final hidden
    states, never its logits. What the model allows (`lm.capabilities`) decides how it runs.

    Args:
        lm: the model.
        batch_size: most sequences in a batch; halved, and remembered, when memory runs out.
        cache_bytes: memory, in all, for what the unedited model computes and candidates need: its
            states below the edited layers, where candidates then start, and its logits; 0: all of
            it is computed for every candidate.
        original: the engine of the unedited model, where `lm` is another model to be compared
            with it (a saved edit, say); `measure` then takes references and batches from there.
        notify: told, in words, when less has to run at once or cannot be kept.
        shared: what processes of a study compute of the unedited model once; with `original` it is
            not used.
    """

    def __init__(
        self,
        lm: LanguageModel,
        batch_size: int,
        *,
        cache_bytes: int = 0,
        original: Engine | None = None,
        notify: Callable[[str], None] = lambda message: None,
        shared: SharedResults | None = None,
    ) -> None:
        if original is not None:
            lm = lm.limited(**vars(original.lm.capabilities))
            cache_bytes = 0
        self.lm: LanguageModel = lm
        self._shared = SharedResults() if shared is None or original is not None else shared
        self.limits = MemoryLimits(
            batch_size, cache_bytes=cache_bytes, notify=notify, offload=self._offload
        )
        self.runner: Runner = Runner(lm, self.limits)
        self._encoded: dict[Prompt, tuple[int, ...]] = {}
        self._reference_responses: dict[_ResponsesKey, list[Response]] = {}
        self._programs: dict[ModelRequest, ModelResult] = {}
        self._responding: dict[_ResponsesKey, CandidateResponses] = {}
        self._forced: ForcedRequests = ForcedRequests(
            lm,
            self.runner,
            self.encode,
            None if original is None else original._forced,
            self._shared,
        )

    @property
    def batch_size(self) -> int:
        """Most sequences in a batch, as memory has allowed so far."""
        return self.limits.batch_size

    def measure(self, plan: Plan | None, requests: Sequence[Request]) -> list[Result]:
        """Answer requests for one candidate; None: the unedited model, whose responses are kept.

        Equal requests run once, response requests for the same prompts and budget run as one,
        and cheap requests run before dear ones.

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
            results += self._measure_some(plans, len(results), requests, watch)
        return results

    def _measure_some(
        self,
        plans: Sequence[Plan | None],
        first: int,
        requests: Sequence[Request],
        watch: Watch | None,
    ) -> list[list[Result] | None]:
        """The first candidates from one on, as many as memory allows at once."""
        counted = None if watch is None else _counted_from(first, watch)
        return self.limits.run(
            lambda: self._measure(plans[first : first + self.limits.candidates], requests, counted),
            candidates=len(plans) - first,
        )

    def _measure(
        self, plans: Sequence[Plan | None], requests: Sequence[Request], watch: Watch | None
    ) -> list[list[Result] | None]:
        progress = Progress(requests, len(plans), watch)
        forced = _distinct_forced(requests)
        if forced:
            self._forced.measure(forced, plans, progress)
        for group in response_groups(requests):
            if progress.going:
                self._respond(group, plans, progress)
        for request in dict.fromkeys(r for r in requests if isinstance(r, ModelRequest)):
            self._run_program(request, plans, progress)
        return progress.results()

    def _run_program(
        self, request: ModelRequest, plans: Sequence[Plan | None], progress: Progress
    ) -> None:
        """Run a program on each candidate; the unedited model's values are kept."""
        for candidate in tuple(progress.going):
            plan = plans[candidate]
            result = self._programs.get(request) if plan is None else None
            if result is None:
                with edited(self.lm.architecture, plan or {}), torch.inference_mode():
                    values = request.program(self.lm.model, self.lm.chat.tokenizer)
                result = ModelResult(values)
            if plan is None:
                self._programs[request] = result
            progress.keep(candidate, {request: result})

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compute the references of requests now, for instance before the model is edited."""
        forced = _distinct_forced(requests)
        if forced:
            self.limits.run(lambda: self._forced.references(forced_keys(forced)))

    def reference(
        self,
        prompts: tuple[Prompt, ...],
        tokens: int,
        responses: Sequence[Response] | None = None,
    ) -> Reference:
        """The unedited model's responses of up to `tokens` tokens and its states over them.

        Args:
            prompts: what it responds to.
            tokens: N.
            responses: the greedy ones, where they have been generated; each has N tokens or ends.
        """
        key = ForcedKey(prompts, tokens)
        if responses is not None:
            self._forced.take_responses(key, responses)
        (reference,) = self.limits.run(lambda: self._forced.references([key]))
        return reference

    def _offload(self) -> str | None:
        """Leave the layers' weights in the machine's memory, where they are on an accelerator."""
        sequences = ForcedSequence((0,), (0,)), ForcedSequence((0, 0), (0,))

        @torch.no_grad()
        def check() -> None:
            """The ways in which the model is run: teacher-forced, and a token at a time."""
            run_forced(self.lm, self.runner.laid_out(sequences))
            Decoding(self.lm, [s.prompt for s in sequences], 2).advance([0, 0])

        moved = offload(self.lm.architecture.layers, check)
        if moved is None:
            return None
        return (
            f"the layers' weights ({moved / 2**30:.1f} GiB) wait in the machine's memory until "
            "they run, which is slower"
        )

    def release(self) -> None:
        """Give back the memory of what is kept; it is computed anew when it is needed."""
        self.limits.release()

    def reference_under(
        self, plan: Plan | None, prompts: tuple[Prompt, ...], tokens: int
    ) -> Reference:
        """`reference(prompts, tokens)` with the hidden states of a plan, from the same batches."""

        def measure() -> Reference:
            reference = self.reference(prompts, tokens)
            return reference.with_hidden(self.hidden_states(plan, prompts, tokens))

        return self.limits.run(measure)

    def hidden_states(self, plan: Plan | None, prompts: tuple[Prompt, ...], tokens: int) -> Tensor:
        """Final hidden states under a plan while being fed the unedited model's greedy responses.

        Returns:
            (rows, D), rows ordered as in `reference(prompts, tokens)`.
        """
        return self.hidden_states_of([plan], prompts, tokens)[0]

    def hidden_states_of(
        self, plans: Sequence[Plan | None], prompts: tuple[Prompt, ...], tokens: int
    ) -> Tensor:
        """The same of K candidates side by side, (K, rows, D)."""
        key = ForcedKey(prompts, tokens)
        return self.limits.run(lambda: self._forced.passes(key).hidden_states(plans))

    def residual_mean(self, prompts: Sequence[Prompt], winsorize_quantile: float) -> Tensor:
        """Mean residual after each layer at the last prompt token, (L, D) float64."""

        def collect() -> Tensor:
            mean = ResidualMean(winsorize_quantile)
            for _, residuals in self._residuals(prompts):
                mean.add(residuals)
            return mean.mean

        shape = len(self.lm.architecture.layers), None
        what = f"residual means winsorized at {winsorize_quantile}"
        facts, single = self._sequences(prompts), prompts if len(prompts) == 1 else ()
        return self._shared.tensor(what, facts, shape, lambda: self.limits.run(collect), single)

    def residuals(self, prompts: Sequence[Prompt]) -> Tensor:
        """Residual after each layer at the last prompt token, (P, L, D) float32, in order."""

        def collect() -> Tensor:
            buckets, rows = zip(*self._residuals(prompts), strict=True)
            order = torch.tensor([index for bucket in buckets for index in bucket])
            return torch.cat(rows)[order.argsort()]

        shape = len(prompts), len(self.lm.architecture.layers), None
        facts = self._sequences(prompts)
        # The last layer's residual tells the first token of a response.
        return self._shared.tensor(
            "residuals", facts, shape, lambda: self.limits.run(collect), prompts
        )

    def _sequences(self, prompts: Sequence[Prompt]) -> dict[str, list[list[int]]]:
        return {"sequences": [list(self.encode(prompt)) for prompt in prompts]}

    def _residuals(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], Tensor]]:
        """Which prompts stand in a batch, and their residuals (B, L, D)."""
        encoded = [self.encode(prompt) for prompt in prompts]
        shared = self.lm.capabilities.shares_prefix(max(map(len, encoded)))
        buckets = length_buckets([len(ids) for ids in encoded], self.batch_size)
        batches = ([encoded[index] for index in bucket] for bucket in buckets)
        prefix = common_prefix(encoded) if shared else ()
        yield from zip(buckets, last_token_residuals(self.lm, batches, prefix), strict=True)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of a prompt, computed once."""
        if prompt not in self._encoded:
            self._encoded[prompt] = self.lm.chat.encode(prompt)
        return self._encoded[prompt]

    def responses(
        self, prompts: tuple[Prompt, ...], max_tokens: int, rule: StopRule | None = None
    ) -> list[Response]:
        """The unedited model's responses, whole or until a rule is decided; kept."""
        return self._responses(prompts, max_tokens, () if rule is None else (rule,))

    def _respond(
        self, group: ResponseGroup, plans: Sequence[Plan | None], progress: Progress
    ) -> None:
        going = tuple(progress.going)
        chosen = [plans[candidate] for candidate in going]

        def hear(responses: Sequence[Sequence[Response]]) -> list[int]:
            """Candidates that need not go on."""
            return [
                slot
                for slot, so_far in enumerate(responses)
                if not progress.hear(going[slot], group.parts(so_far, self.lm.chat.decode))
            ]

        if chosen == [None]:
            responses = [self._responses(group.prompts, group.max_tokens, group.rules)]
        else:
            responding = self._candidate_responses(group)
            responses = responding.responses(chosen, hear if progress.watched else None)
        for slot, candidate in enumerate(going):
            if candidate in progress.going:
                progress.keep(candidate, group.results(responses[slot], self.lm.chat.decode))

    def _candidate_responses(self, group: ResponseGroup) -> CandidateResponses:
        key = (group.prompts, group.max_tokens, group.rules)
        if key not in self._responding:
            encoded = [self.encode(prompt) for prompt in group.prompts]
            self._responding[key] = CandidateResponses(self.lm, self.limits, group, encoded)
        return self._responding[key]

    def _responses(
        self, prompts: tuple[Prompt, ...], max_tokens: int, rules: tuple[StopRule, ...]
    ) -> list[Response]:
        """The unedited model's, kept."""
        key = (prompts, max_tokens, rules)
        if key not in self._reference_responses:
            encoded = [self.encode(prompt) for prompt in prompts]
            self._reference_responses[key] = self._shared.responses(
                prompts,
                encoded,
                max_tokens,
                rules,
                None,
                self.lm.head.vocabulary,
                lambda: self.runner.responses(encoded, max_tokens, rules),
            )
        return self._reference_responses[key]


def _distinct_forced(requests: Sequence[Request]) -> list[TeacherForcedRequest]:
    return list(dict.fromkeys(r for r in requests if isinstance(r, TeacherForcedRequest)))


def _counted_from(first: int, watch: Watch) -> Watch:
    """The same watch for candidates that are counted from another one on."""
    return lambda candidate, so_far: watch(first + candidate, so_far)
