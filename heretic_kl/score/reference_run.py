"""What the reference computed over its sequences, and candidates run beside it. No statistics.

Only token ids, final hidden states and the head are kept: the model itself may be edited in place,
trained or dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from heretic_kl.engine import (
    MemoryLimits,
    Runner,
    model_identity,
    reference_from,
)
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import (
    DivergenceReduction,
    Head,
    KLTable,
    LogitBlock,
    Reference,
)
from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
from heretic_kl.kl.reference import StoredLogits
from heretic_kl.kl.terms import row_blocks
from heretic_kl.model import (
    CausalModel,
    DtypeName,
    evaluating,
    free_memory,
    packed_bytes,
    packing_weights,
)
from heretic_kl.score.detail import PassNotes
from heretic_kl.score.llama.candidate import compare_natively, reference_in_llama
from heretic_kl.score.llama.reference import LiveLogits, LlamaReference
from heretic_kl.score.loader import ModelLoader, as_source
from heretic_kl.score.reference_side import ReferenceSide
from heretic_kl.score.served import KnownTokens, compare_served, is_served
from heretic_kl.score.vllm.candidate import compare_in_vllm, reference_in_vllm

AnyRunner: TypeAlias = Runner | LlamaReference
"""Runs the reference: both give its responses."""
Watch: TypeAlias = Callable[[LogitBlock], LogitBlock]
"""Sees a candidate's logits, and says what is compared of them."""
Observe: TypeAlias = PassNotes
"""Sees rows (n,) and both models' logits (n, V) there, as they are compared."""


class CandidateTable(NamedTuple):
    """A candidate's divergences and what it computed in."""

    table: KLTable
    dtype: str
    back_end_floor: float | None = None
    """Nats between two back ends on the candidate itself; None: not measured, or one back end."""
    known_tokens: KnownTokens | None = None
    """Not None: the table holds lower bounds, from the tokens that a server told of."""


class ReferenceRun(ReferenceSide):
    """The reference's side of every comparison, and what is run.

    Raises (all methods that run or compare): MeasurementError, in one line.
    """

    @classmethod
    def over(
        cls,
        lm: CausalModel | LlamaReference,
        sequences: Callable[[AnyRunner], Sequence[ForcedSequence]],
        positions: int,
        settings: dict[str, Any],
        *,
        loader: ModelLoader,
        batch_size: int,
        trees: bool = False,
        packs: bool | None = None,
        then: Callable[[AnyRunner, Reference], None] = lambda runner, reference: None,
    ) -> ReferenceRun:
        """Run the reference.

        Args:
            lm: the reference.
            sequences: what it is fed; may have it respond first.
            positions: N, most scored positions of a sequence.
            settings: what a stored reference is known by, see `ReferenceIdentity`.
            loader: for candidates.
            batch_size: most sequences at once; halved where memory runs out.
            trees: run trees of tokens, if the model allows it.
            packs: lay out weights for the CPU; None: of a loaded model, where they fit in memory.
            then: what else is to be measured of the reference while it is there.
        """
        notify = loader.notify
        if isinstance(lm, LlamaReference):
            lm.progress = loader.progress
            reference = lm.reference(tuple(sequences(lm)), positions, settings)
            then(lm, reference)
            tokenizer = lm.chat.tokenizer
            return cls(reference, loader, batch_size, True, tokenizer=tokenizer, notify=notify)
        if packs is None:
            most = (free_memory(lm.device) or 0) // 2
            packs = loader.reference_name is not None and 0 < packed_bytes(lm) <= most
        trees = trees and lm.capabilities.tree_problem is None
        with evaluating(lm.model), packing_weights(lm, packs) as lm:
            problem = lm.capabilities.prefix_problem
            if problem is not None:
                notify(f"the common beginning of prompts is not shared: {problem}")
            limits = MemoryLimits(batch_size, notify=notify)
            runner = Runner(lm, limits, trees=trees, progress=loader.progress)
            forced = tuple(sequences(runner))
            identity = model_identity(lm, {**settings, "dtype": lm.dtype_name})
            reference = reference_from(forced, positions, runner.hidden_states(forced), identity)
            fitting = runner.limits.batch_size
            then(runner, reference)
        shares = problem is None
        head, tokenizer = lm.head.kept(), lm.chat.tokenizer
        return cls(reference, loader, fitting, shares, head, tokenizer, notify, trees, packs)

    def compare(
        self,
        candidate: Any,
        tokenizer: Any = None,
        *,
        reduction: DivergenceReduction,
        base: Any = None,
        dtype: DtypeName | None = None,
        floor: bool = True,
        watch: Watch | None = None,
        observe: Observe | None = None,
    ) -> CandidateTable:
        """Run a candidate over the same sequences; see `TeacherForcedKL.score`.

        With `floor`, one in another back end is also run in the reference's. All logits go through
        `watch` on their way to the statistics, and are shown to `observe`.
        """
        if is_served(candidate):
            served = self.loader.served(candidate)
            put_on = base or self.loader.base
            return compare_served(self, served, reduction, base=put_on, observe=observe)
        source = as_source(candidate)
        if source is not None and self.loader.in_vllm(source):
            put_on = self.loader.base_of(source, base)
            return compare_in_vllm(
                *(self, source, reduction),
                base=put_on,
                dtype=dtype,
                floor=floor and self.head is not None,  # none from stored logits, or in a chain
                watch=watch,
                observe=observe,
            )
        if source is not None and self.loader.in_llama(source):
            floor = floor and not self.in_llama  # else there is one back end
            return compare_natively(
                self, source, reduction, floor=floor, watch=watch, observe=observe
            )
        lm, own_tokenizer = self.loader.candidate(
            candidate,
            tokenizer,
            base,
            fallback=self.tokenizer,
            dtype=dtype or self.dtype_for_candidates(),
        )
        if own_tokenizer:
            self.require(tokenizer_hash=lm.tokenizer_hash())
        return CandidateTable(self._ran(lm, reduction, watch, observe), lm.dtype_name)

    def seen_by(
        self,
        model: Any,
        *,
        sequences: Sequence[ForcedSequence] | None = None,
        base: Any = None,
        dtype: DtypeName | None = None,
        native: bool = True,
    ) -> ReferenceRun:
        """The same sequences with another model as the reference, to measure a third from it.

        The third is loaded in what this one's candidates are, where no dtype is asked for.

        Args:
            model: as for `compare`.
            sequences: other ones in their place.
            base: as for `compare`.
            dtype: as for `compare`.
            native: run it in llama.cpp or vLLM where the loader says so.
        """
        source, fed = as_source(model), self.sequences if sequences is None else sequences
        positions = int(self.reference.mask.shape[1])
        settings = {**self.reference.identity.settings, "model": None}
        alike = dtype or self.dtype_for_candidates()
        if native and source is not None and self.loader.in_vllm(source):
            put_on = self.loader.base_of(source, base)
            seen = reference_in_vllm(self, source, settings, base=put_on, dtype=dtype)
            return replace(self, reference=seen, head=None, candidate_dtype=alike)
        if native and source is not None and self.loader.in_llama(source):
            seen = reference_in_llama(self, source, settings)
            return replace(self, reference=seen, head=None, candidate_dtype=alike)
        lm, own_tokenizer = self.loader.candidate(
            model,
            self.tokenizer if source is not None and source.gguf_file is not None else None,
            base,
            fallback=self.tokenizer,
            dtype=alike,
        )
        if own_tokenizer:
            self.require(tokenizer_hash=lm.tokenizer_hash())
        other = ReferenceRun.over(
            lm,
            lambda _: fed,
            positions,
            settings,
            loader=self.loader,
            batch_size=self.batch_size,
            trees=self.trees,
            packs=self.packs and packed_bytes(lm) > 0,
        )
        return replace(other, tokenizer=self.tokenizer, candidate_dtype=alike)

    def _ran(
        self,
        lm: CausalModel,
        reduction: DivergenceReduction,
        watch: Watch | None,
        observe: Observe | None,
    ) -> KLTable:
        """A candidate in `transformers`, run as the reference ran."""
        limits = MemoryLimits(self.batch_size, notify=self.notify)
        if not self.share_prefix:  # as the reference ran
            lm = lm.limited(prefix_problem="the reference does not share it")
        packs = self.packs and packed_bytes(lm) > 0
        with evaluating(lm.model), torch.no_grad(), packing_weights(lm, packs) as lm:
            head, candidate_head = self.heads(lm.head)
            runner = Runner(lm, limits, trees=self.trees, progress=self.loader.progress)
            table = limits.run(
                lambda: self.table(
                    logit_blocks(runner, self.sequences, candidate_head),
                    head,
                    reduction,
                    watch,
                    observe,
                )
            )
        if limits.batch_size != self.batch_size:
            raise MeasurementError(
                f"out of memory: the reference ran in batches of {self.batch_size}, the candidate "
                f"only fits in {limits.batch_size}; measure both with batch size "
                f"{limits.batch_size}"
            )
        return table

    def table(
        self,
        blocks: Iterable[LogitBlock],
        head: Head | None,
        reduction: DivergenceReduction,
        watch: Watch | None = None,
        observe: Observe | None = None,
    ) -> KLTable:
        """What a candidate's logits, block by block, come to beside the reference's."""
        return self.reference.measure_blocks(
            blocks if watch is None else map(watch, blocks),
            head=head,
            divergence=reduction.divergence,
            temperature=reduction.temperature,
            observe=observe,
        )

    def with_logits(self) -> Reference:
        """The reference with float16 logits in place of hidden states.

        Raises:
            MeasurementError: it was itself loaded without its head.
        """
        stored = self.reference
        if isinstance(stored.logits, StoredLogits):
            return stored
        return Reference.from_logits(
            stored.tokens,
            stored.mask,
            self.reference_blocks(),
            replace(stored.identity, head_fingerprint=None),
            prompts=stored.prompts,
        )

    def reference_blocks(self) -> Iterator[Tensor]:
        """The reference's raw logits, (n, V) at a time, in the rows' order.

        Raises:
            MeasurementError: it was itself loaded without its head.
        """
        logits, head, hidden = self.reference.logits, self.head, self.reference.hidden
        if isinstance(logits, LiveLogits):
            yield from logits.blocks()
        elif head is not None and hidden is not None:
            for block in row_blocks(len(hidden), head.vocabulary, MAX_LOGIT_ELEMENTS):
                yield head.logits(hidden[block])
        else:
            raise MeasurementError("logits can only be stored where the reference's head is known")


def logit_blocks(
    runner: Runner, sequences: Sequence[ForcedSequence], head: Head, part: str = "candidate"
) -> Iterator[LogitBlock]:
    """A model's logits at all scored positions, in the batches of its runner."""
    for rows, hidden in runner.portions(sequences, part):
        for block in row_blocks(len(rows), head.vocabulary, MAX_LOGIT_ELEMENTS):
            yield LogitBlock(rows[block], head.logits(hidden[0, block]))
