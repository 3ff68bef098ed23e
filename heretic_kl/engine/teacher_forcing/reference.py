"""The unedited model's side of teacher forcing: its responses and what it computes over them.

And what another model's final hidden states are reduced to beside them. Runs no plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from heretic_kl.engine.generation.generate import Response
from heretic_kl.engine.memory_limits import MemoryLimits
from heretic_kl.engine.runner import Runner
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.kl import Divergence, Head, Reference, ReferenceIdentity
from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
from heretic_kl.kl.terms import row_blocks
from heretic_kl.model import CausalModel
from heretic_kl.requests import (
    Prepared,
    RowReduction,
    Sampling,
    TeacherForcedResult,
)

CPU_LOGIT_ELEMENTS = 2**23
"""Logits of a candidate made at once on a CPU: larger tensors are mapped anew each time."""


def model_identity(
    lm: CausalModel, settings: Mapping[str, str | int | float | bool | None] | None = None
) -> ReferenceIdentity:
    """By what a stored reference of this model is known again; see `ReferenceIdentity`."""
    return ReferenceIdentity(
        tokenizer_hash=lm.tokenizer_hash(),
        vocabulary_size=lm.head.vocabulary,
        head_fingerprint=lm.head.fingerprint(),
        settings=settings or {},
    )


def with_responses(
    runner: Runner,
    encoded: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling | None = None,
) -> tuple[ForcedSequence, ...]:
    """Prompts with the model's own responses, which every candidate will be fed.

    Args:
        runner: of the unedited model.
        encoded: token ids of the prompts.
        tokens: N, most tokens of a response; the end token is the last of one.
        sampling: how responses are drawn; None: greedy.
    """
    responses = runner.responses(encoded, tokens, sampling=sampling)
    return forced_by(encoded, responses, tokens)


def forced_by(
    encoded: Iterable[Sequence[int]], responses: Sequence[Response], tokens: int
) -> tuple[ForcedSequence, ...]:
    """Prompts with these responses, of up to `tokens` tokens."""
    return tuple(
        ForcedSequence(tuple(prompt), tuple(response.reference_tokens(tokens)))
        for prompt, response in zip(encoded, responses, strict=True)
    )


def reference_from(
    sequences: Sequence[ForcedSequence],
    tokens: int,
    hidden: Tensor,  # (rows, D)
    identity: ReferenceIdentity,
) -> Reference:
    """The reference that sequences and the model's final hidden states over them make."""
    response_ids = _padded([s.response for s in sequences], tokens)
    return Reference.from_hidden(
        response_ids.clamp_min(0),
        response_ids >= 0,
        hidden,
        identity,
        prompts=_padded([s.prompt for s in sequences], max(len(s.prompt) for s in sequences)),
    )


def forced_sequences(reference: Reference) -> tuple[ForcedSequence, ...]:
    """What a reference feeds to every model."""
    assert reference.prompts is not None  # `reference_from` keeps them
    prompts, responses = reference.prompts.tolist(), reference.tokens.tolist()
    lengths = reference.mask.sum(dim=1).tolist()
    return tuple(
        ForcedSequence(tuple(t for t in prompt if t >= 0), tuple(response[:length]))
        for prompt, response, length in zip(prompts, responses, lengths, strict=True)
    )


class KeptLogits:
    """A reference's logits, or what reductions make of them, kept as far as memory is left.

    From the first candidate on. Candidates come in the same blocks of rows, so what is kept is
    what would be computed.
    """

    def __init__(self, reference: Reference, head: Head, limits: MemoryLimits) -> None:
        self._reference = reference
        self._head = head
        self._limits = limits
        limits.hold(self)
        self._logits: dict[tuple[int, ...], Tensor] = {}
        self._prepared: dict[tuple[RowReduction, tuple[int, ...]], Prepared] = {}
        self._times_as_large: dict[RowReduction, float] = {}  # what was prepared, than logits

    @property
    def bytes(self) -> int:
        """Memory taken now."""
        logits = sum(block.nbytes for block in self._logits.values())
        return logits + sum(prepared.bytes for prepared in self._prepared.values())

    def release(self) -> None:
        """Give it back."""
        self._logits.clear()
        self._prepared.clear()

    def of(self, rows: Tensor, reduction: RowReduction) -> Any:
        """What a reduction is given of rows (n,) int64; not to be written to.

        Logits (n, V) float32, or what the reduction makes of them where that can be kept.
        """
        key = tuple(rows.tolist())
        stored = self._prepared.get((reduction, key), self._logits.get(key))
        if stored is not None:
            return stored
        logits, left = self._computed(rows), self._limits.cache_left
        prepare = getattr(reduction, "prepare", None)  # see `PreparingReduction`
        # For one use it is not worth making: reductions do that in blocks that fit in a cache.
        if prepare is not None and logits.nbytes * self._times_as_large.get(reduction, 1.0) <= left:
            prepared: Prepared = prepare(logits)
            self._times_as_large[reduction] = prepared.bytes / logits.nbytes
            if prepared.bytes <= left:
                self._prepared[reduction, key] = prepared
                return prepared
        if logits.nbytes <= left:
            self._logits[key] = logits
        return logits

    def _computed(self, rows: Tensor) -> Tensor:
        states = self._reference.hidden
        assert states is not None
        return self._head.logits(states[rows.to(states.device)])


class ReducedRows:
    """Columns of a reduction, of rows of several candidates that come in portion by portion.

    The reference's logits serve all candidates; (P, N, V) logits are never held for them.

    `logits` are those of the reference; None: the reduction does not read them. `head` makes those
    of the candidates.
    """

    def __init__(
        self,
        reference: Reference,
        reduction: RowReduction,
        candidates: int,
        *,
        logits: KeptLogits | None,
        head: Head,
    ) -> None:
        self._reference = reference
        self._reduction = reduction
        self._kept = logits
        self._head = head
        on_cpu = head.weight.device.type == "cpu"
        self._elements = CPU_LOGIT_ELEMENTS if on_cpu else MAX_LOGIT_ELEMENTS
        self._rows: list[Tensor] = []
        self._parts: list[list[tuple[Tensor, ...]]] = [[] for _ in range(candidates)]

    @property
    def begun(self) -> bool:
        """Whether any row is there."""
        return bool(self._rows)

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        return sum(len(rows) for rows in self._rows) == self._reference.rows

    def add(self, rows: Tensor, hidden: Tensor) -> None:
        """Reduce some more rows.

        Args:
            rows: (n,) int64, among the reference's rows.
            hidden: (K, n, D) final hidden states of the candidates.
        """
        tokens = self._reference.row_tokens
        for block in row_blocks(len(rows), self._head.vocabulary, self._elements):
            chosen = rows[block]
            own_tokens = tokens[chosen.to(tokens.device)].to(hidden.device)
            reference = None if self._kept is None else self._kept.of(chosen, self._reduction)
            for parts, states in zip(self._parts, hidden, strict=True):
                logits = self._head.logits(states[block])
                reference_logits = logits[:0] if reference is None else reference
                parts.append(self._reduction(reference_logits, logits, own_tokens))
        self._rows.append(rows)

    def result(self, candidate: int) -> TeacherForcedResult:
        """What is there of one candidate, rows in the reference's order."""
        rows, order = torch.cat(self._rows).sort()
        parts = self._parts[candidate]
        columns = [torch.cat(column).cpu()[order] for column in zip(*parts, strict=True)]
        kind = type(parts[0])
        return TeacherForcedResult(
            kind(columns) if kind is tuple else kind(*columns),
            self._reference.prompt_index[rows],
            self._reference.position[rows],
        )


def mean_kl(
    reference: Reference,
    hidden: Tensor,  # (rows, D)
    *,
    head: Head,
    candidate_head: Head | None = None,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
) -> float:
    """KL in nats between two sets of hidden states, mean over positions, then over prompts."""
    table = reference.measure(
        hidden,
        head=head,
        candidate_head=candidate_head,
        divergence=divergence,
        temperature=temperature,
    )
    counts = table.mask.sum(dim=1)
    scored = counts > 0
    return float((table.values.sum(dim=1)[scored] / counts[scored]).mean())


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """(P, width) int64, -1 after each row's last token."""
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int64)
