"""A model in vLLM, measured beside a reference; and how far vLLM and transformers are apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError, ModelError
from heretic_kl.kl import DivergenceReduction, KLTable, LogitBlock, Reference, summarize
from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
from heretic_kl.kl.terms import row_blocks
from heretic_kl.model import (
    DtypeName,
    ModelSource,
    clear_device_memory,
    free_memory,
    is_quantized,
)
from heretic_kl.score.vllm.model import VLLMModel

if TYPE_CHECKING:
    from heretic_kl.score.reference_run import CandidateTable, Observe, ReferenceRun, Watch

FLOOR_TOKENS = 4096
"""So many tokens are enough to see how far two back ends are apart."""
ROUNDED = ", held as float16"
COMPARED = 4
"""Sequences by which an adapter is told from its base."""


def compare_in_vllm(
    run: ReferenceRun,
    source: ModelSource,
    reduction: DivergenceReduction,
    *,
    base: ModelSource | None = None,
    dtype: DtypeName | None = None,
    floor: bool = True,
    watch: Watch | None = None,
    observe: Observe | None = None,
) -> CandidateTable:
    """Measure a model in vLLM.

    Args:
        run: the reference's side.
        source: a folder or hub id; an adapter's counts.
        reduction: what is measured.
        base: what an adapter is put on.
        dtype: of weights and activations; None: the reference's, or as the model says if its
            weights are quantized.
        floor: also run the model in `transformers`, as the reference ran, and compare the two.
        watch: see `ReferenceRun.compare`.
        observe: likewise.

    Raises:
        ModelError: vLLM is not installed, or cannot load the model.
        MeasurementError: another tokenizer, or an adapter that changes nothing.
    """
    from heretic_kl.score.reference_run import CandidateTable

    run.head_for(run.reference.identity.vocabulary_size)  # refuses a reference without any
    beside = _in_transformers(run, source, base, dtype) if floor else None
    model = _open(run, source, base, dtype)
    try:
        if source.adapter is not None:
            _require_adapter(run, model, source)
        table = _table(run, model, reduction, watch, observe)
        apart = None if beside is None else summarize(_table(beside, model, reduction)).mean
        return CandidateTable(table, model.kind, apart)
    finally:
        model.close()


def _require_adapter(run: ReferenceRun, model: VLLMModel, source: ModelSource) -> None:
    """Refuse an adapter without which vLLM computes the same, bit for bit."""
    for sequence in run.sequences[:COMPARED]:
        if not torch.equal(model.logits(sequence), model.logits(sequence, adapted=False)):
            return
    raise MeasurementError(
        f"{source.name!r} in vLLM is like its base, bit for bit: vLLM ignores the adapter, or it "
        "changes nothing"
    )


class HeldLogits(NamedTuple):
    """A `RowLogits` of raw logits, as vLLM gave them: a model measured from itself is at 0."""

    logits: Tensor  # (rows, V) float32

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.logits.shape[0])

    def of(self, rows: Tensor) -> Tensor:
        """Raw logits (n, V) of some rows."""
        return self.logits[rows]


def reference_in_vllm(
    run: ReferenceRun,
    source: ModelSource,
    settings: Mapping[str, Any],
    *,
    base: ModelSource | None,
    dtype: DtypeName | None,
) -> Reference:
    """What a model says over a run's sequences: logits (rows, V) in memory.

    They are float32, or float16 with a notice where float32 takes more than half of the free
    memory; the other half is for the model that is measured from this one.

    Args:
        run: the side of the reference that it is a candidate of.
        source: as for `compare_in_vllm`, like `base` and `dtype`.
        settings: see `ReferenceIdentity`.
        base: what an adapter is put on.
        dtype: of weights and activations.

    Raises:
        MeasurementError: not even float16 fits in the free memory.
    """
    model = _open(run, source, base, dtype)
    try:
        stored, size = run.reference, model.vocabulary
        identity = replace(
            stored.identity,
            vocabulary_size=size,
            head_fingerprint=None,
            settings={**settings, "dtype": model.kind},
        )
        blocks = _blocks(model, run.told("reference"), size)
        needed = stored.rows * size * torch.float32.itemsize
        free = free_memory(torch.device("cpu"))
        if free is None or needed <= free // 2:
            logits = torch.empty(stored.rows, size)
            for rows, block in blocks:
                logits[rows] = block
            held = HeldLogits(logits)
            return replace(stored, identity=identity, hidden=None, logits=held)
        if needed // 2 > free:
            raise MeasurementError(
                f"logits of {source.name!r} take {needed / 2e9:.3g} GB even as float16, and "
                f"{free / 1e9:.3g} GB of memory are free: measure fewer positions"
            )
        run.notify(
            f"logits of {source.name!r} are held as float16: as float32 they take "
            f"{needed / 1e9:.3g} GB, more than half of the {free / 1e9:.3g} GB that are free"
        )
        identity = replace(identity, settings={**settings, "dtype": f"{model.kind}{ROUNDED}"})
        return Reference.from_logits(
            *(stored.tokens, stored.mask, (block.logits for block in blocks), identity),
            prompts=stored.prompts,
        )
    finally:
        model.close()


def _open(
    run: ReferenceRun, source: ModelSource, base: ModelSource | None, dtype: DtypeName | None
) -> VLLMModel:
    loader = run.loader
    whole = source if base is None or source.adapter is None else base
    loader.check(source, base)
    loader.require_tokenizer(source, run.reference.identity.tokenizer_hash)
    if dtype is None and not is_quantized(whole, loader.trust_remote_code):
        dtype = run.dtype_for_candidates()
    clear_device_memory()
    return VLLMModel(
        whole.name if whole.folder is None else str(whole.folder),
        context=max(len(sequence.prompt) + len(sequence.response) for sequence in run.sequences),
        dtype=dtype or loader.dtype,
        adapter=source.adapter,
        trust_remote_code=loader.trust_remote_code,
    )


def _table(
    run: ReferenceRun,
    model: VLLMModel,
    reduction: DivergenceReduction,
    watch: Watch | None = None,
    observe: Observe | None = None,
) -> KLTable:
    head, size = run.head_for(model.vocabulary)
    blocks = _blocks(model, run.told("candidate"), size)
    return run.table(blocks, head, reduction, watch, observe)


def _blocks(
    model: VLLMModel, sequences: Iterable[ForcedSequence], size: int
) -> Iterator[LogitBlock]:
    """Logits of the first `size` tokens, sequence by sequence."""
    row = 0
    for sequence in sequences:
        logits = model.logits(sequence)
        rows = torch.arange(row, row + len(logits))
        for block in row_blocks(len(logits), size, MAX_LOGIT_ELEMENTS):
            yield LogitBlock(rows[block], logits[block, :size])
        row += len(logits)


def _in_transformers(
    run: ReferenceRun, source: ModelSource, base: ModelSource | None, dtype: DtypeName | None
) -> ReferenceRun | None:
    """The same model, run as the reference was over the first of its sequences."""
    count, tokens = 0, 0
    while count < len(run.sequences) and tokens < FLOOR_TOKENS:
        tokens += len(run.sequences[count].fed)
        count += 1
    part = run.sequences[:count]
    try:
        return run.seen_by(source, sequences=part, base=base, dtype=dtype, native=False)
    except (ModelError, MeasurementError) as error:
        run.notify(f"the floor across back ends is not measured: {error}")
        return None
