"""Teacher-forced requests of one measurement: all their sequences run in one pass a candidate.

Owns the unedited model's responses and what it computes over them. Serves no response requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from heretic_kl import ranks
from heretic_kl.ablation import Plan
from heretic_kl.engine.candidate_results import Progress
from heretic_kl.engine.generation.generate import Response
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.shared import SharedResults, arithmetic
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.engine.teacher_forcing.forward import ForcedPortion
from heretic_kl.engine.teacher_forcing.passes import CandidatePasses
from heretic_kl.engine.teacher_forcing.reference import (
    KeptLogits,
    ReducedRows,
    forced_by,
    model_identity,
    reference_from,
)
from heretic_kl.kl import Reference, ReferenceIdentity
from heretic_kl.model import LanguageModel
from heretic_kl.prompts import Prompt
from heretic_kl.requests import PartialRows, Request, Sampling, SoFar, TeacherForcedRequest


class ForcedKey(NamedTuple):
    """What a reference is of."""

    prompts: tuple[Prompt, ...]
    tokens: int
    sampling: Sampling | None = None


def forced_keys(requests: Sequence[TeacherForcedRequest]) -> tuple[ForcedKey, ...]:
    """The references that requests need, each once, the cheapest first."""
    keys = dict.fromkeys(_key(request) for request in requests)
    return tuple(sorted(keys, key=lambda key: len(key.prompts) * key.tokens))


class ForcedRequests:
    """Teacher-forced requests to one model.

    `original` are those of the unedited model, where `lm` is another one to be compared with it.
    `shared` is what other processes may have computed of the unedited one.
    """

    def __init__(
        self,
        lm: LanguageModel,
        runner: Runner,
        encode: Callable[[Prompt], tuple[int, ...]],
        original: ForcedRequests | None,
        shared: SharedResults,
    ) -> None:
        self._lm = lm
        self._runner = runner
        self._encode = encode
        self._original = original
        self._shared = shared
        self._takes_states = True
        self._sequences: dict[ForcedKey, tuple[ForcedSequence, ...]] = {}
        self._together: dict[tuple[ForcedKey, ...], _Together] = {}

    def references(self, keys: Sequence[ForcedKey]) -> tuple[Reference, ...]:
        """Of each key, the unedited model's responses and its states over them.

        The states come from the batches in which candidates run when asked for the same keys.
        """
        return self._run_together(keys).references

    def take_responses(self, key: ForcedKey, responses: Sequence[Response]) -> None:
        """Use responses that have been generated, unless there are some."""
        encoded = map(self._encode, key.prompts)
        forced = forced_by(encoded, responses, key.tokens)
        self._sequences.setdefault(key, forced)

    def passes(self, *keys: ForcedKey) -> CandidatePasses:
        """What runs candidates over the responses of these references, one after the other."""
        return self._run_together(keys).passes

    def measure(
        self,
        requests: Sequence[TeacherForcedRequest],
        plans: Sequence[Plan | None],
        progress: Progress,
    ) -> None:
        """Have every candidate that is still going answer all requests.

        The unedited model has the reference's states, to the last bit. Where those of another
        process differ, they are computed here, now and from then on.
        """
        together = self._run_together(forced_keys(requests))
        for _, going in together.passes.grouped(tuple(progress.going)):
            if not self._measure_side_by_side(together, requests, plans, going, progress):
                self._shared.notify(
                    "the original model's final hidden states are computed again: another "
                    "worker's are not exactly this machine's"
                )
                self._takes_states = False
                self._together.clear()
                self.measure(requests, plans, progress)
                return

    def _measure_side_by_side(
        self,
        together: _Together,
        requests: Sequence[TeacherForcedRequest],
        plans: Sequence[Plan | None],
        going: Sequence[int],
        progress: Progress,
    ) -> bool:
        """False: the unedited model's states are not the reference's, and nothing is answered."""
        compared = together.of_another and len(plans) == 1 and not plans[0]
        same = True
        reduced = {request: self._reduced(together, request, len(going)) for request in requests}

        def consume(portions: Iterator[ForcedPortion]) -> None:
            nonlocal same
            for portion in portions:
                for request, rows in reduced.items():
                    part = together.portion(_key(request), portion)
                    if len(part.rows):
                        rows.add(part.rows, part.hidden)
                        same = same and (not compared or together.holds(_key(request), part))
                whole = all(rows.complete for rows in reduced.values())
                # Of several candidates none can leave the pass.
                if len(going) == 1 and progress.watched and not whole:
                    parts: dict[Request, SoFar] = {
                        request: rows.result(0) if rows.complete else PartialRows(rows.result(0))
                        for request, rows in reduced.items()
                        if rows.begun
                    }
                    if not progress.hear(going[0], parts):
                        return

        together.passes.run([plans[candidate] for candidate in going], consume)
        if compared:
            if not ranks.from_first(lambda: same):
                return False
            together.of_another = False
        for slot, candidate in enumerate(going):
            if candidate in progress.going:
                progress.keep(candidate, {r: rows.result(slot) for r, rows in reduced.items()})
        return True

    def _reduced(
        self, together: _Together, request: TeacherForcedRequest, candidates: int
    ) -> ReducedRows:
        return ReducedRows(
            together.reference(_key(request)),
            request.reduction,
            candidates,
            logits=together.logits(_key(request)) if request.reference_logits else None,
            head=self._lm.head,
        )

    def _run_together(self, keys: Sequence[ForcedKey]) -> _Together:
        """What is kept of the keys; computed again where batches have changed."""
        keys = tuple(keys)
        size = self._runner.limits.batch_size
        # Reference and candidate must have run in the same batches.
        self._together = {k: t for k, t in self._together.items() if t.batch_size == size}
        together = self._together.get(keys)
        if self._original is not None:
            references = self._original._run_together(keys).references
            if together is None or together.references is not references:
                together = self._new(keys, references)
        elif together is None:
            references, of_another = self._own_references(keys)
            together = self._new(keys, references)
            together.of_another = of_another
        self._together[keys] = together
        return together

    def _new(self, keys: tuple[ForcedKey, ...], references: tuple[Reference, ...]) -> _Together:
        head = self._lm.head if self._original is None else self._original._lm.head
        limits = self._runner.limits
        logits = [KeptLogits(reference, head, limits) for reference in references]
        sequences = [s for key in keys for s in self._with_responses(key)]
        passes = CandidatePasses(self._lm, self._runner, sequences)
        return _Together(keys, references, logits, passes, limits.batch_size)

    def _own_references(self, keys: Sequence[ForcedKey]) -> tuple[tuple[Reference, ...], bool]:
        """References, and whether their states come from another process."""
        sequences = [self._with_responses(key) for key in keys]
        together = [s for group in sequences for s in group]
        facts = {
            **arithmetic(self._lm, self._runner.limits.batch_size),
            "sequences": [[s.prompt, s.response] for s in together],
        }
        computed: list[Tensor] = []

        def compute() -> Tensor:
            computed.append(self._runner.hidden_states(together))
            return computed[0]

        # With the head they tell the responses.
        shape = sum(len(s.response) for s in together), self._lm.head.weight.shape[1]
        prompts = [prompt for key in keys for prompt in key.prompts]
        hidden = (
            self._shared.tensor("final hidden states", facts, shape, compute, prompts)
            if self._takes_states
            else compute()
        )
        of_another = not computed or hidden is not computed[0]
        hidden = hidden.to(self._lm.device)
        rows = [sum(len(sequence.response) for sequence in group) for group in sequences]
        references = tuple(
            reference_from(group, key.tokens, states, self._identity)
            for key, group, states in zip(keys, sequences, torch.split(hidden, rows), strict=True)
        )
        return references, of_another

    def _with_responses(self, key: ForcedKey) -> tuple[ForcedSequence, ...]:
        if self._original is not None:
            return self._original._with_responses(key)
        if key not in self._sequences:
            encoded = [self._encode(prompt) for prompt in key.prompts]
            responses = self._shared.responses(
                key.prompts,
                encoded,
                key.tokens,
                (),
                key.sampling,
                self._lm.head.vocabulary,
                lambda: self._runner.responses(encoded, key.tokens, sampling=key.sampling),
            )
            self._sequences[key] = forced_by(encoded, responses, key.tokens)
        return self._sequences[key]

    @cached_property
    def _identity(self) -> ReferenceIdentity:
        return model_identity(self._lm)


class _Together:
    """References whose sequences run in one pass, and the passes over them."""

    def __init__(
        self,
        keys: tuple[ForcedKey, ...],
        references: tuple[Reference, ...],
        logits: Sequence[KeptLogits],
        passes: CandidatePasses,
        batch_size: int,
    ) -> None:
        self.references = references
        self.passes = passes
        self.batch_size = batch_size
        self.of_another = False
        """The states come from another process, and no pass was compared with them yet."""
        self._logits = dict(zip(keys, logits, strict=True))
        self._of = dict(zip(keys, references, strict=True))
        self._places: dict[ForcedKey, range] = {}
        start = 0
        for key, reference in self._of.items():
            self._places[key] = range(start, start + reference.rows)
            start += reference.rows

    def reference(self, key: ForcedKey) -> Reference:
        return self._of[key]

    def logits(self, key: ForcedKey) -> KeptLogits:
        return self._logits[key]

    def holds(self, key: ForcedKey, part: ForcedPortion) -> bool:
        """Whether the first candidate's states are those of a key's reference."""
        states = self._of[key].hidden
        assert states is not None  # the engine keeps hidden states
        expected = states[part.rows.to(states.device)]
        return torch.equal(expected, part.hidden[0].to(states.device))

    def portion(self, key: ForcedKey, portion: ForcedPortion) -> ForcedPortion:
        """What of a portion belongs to a key, rows counted as in its reference."""
        place = self._places[key]
        belongs = (portion.rows >= place.start) & (portion.rows < place.stop)
        if bool(belongs.all()):
            return ForcedPortion(portion.rows - place.start, portion.hidden)
        chosen = belongs.nonzero().squeeze(-1)
        hidden = portion.hidden[:, chosen.to(portion.hidden.device)]
        return ForcedPortion(portion.rows[chosen] - place.start, hidden)


def _key(request: TeacherForcedRequest) -> ForcedKey:
    return ForcedKey(request.prompts, request.tokens, request.sampling)
