"""A GGUF file in llama.cpp, measured beside a reference; and how far two back ends are apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError, ModelError
from heretic_kl.kl import DivergenceReduction, KLTable, LogitBlock, Reference, summarize
from heretic_kl.model import ModelSource, free_memory, gguf_weights
from heretic_kl.model.loading.devices import resolve_device
from heretic_kl.score.llama.model import EXACT_CACHE_TYPES, LlamaModel
from heretic_kl.score.llama.reference import LiveLogits, kind_of
from heretic_kl.score.llama.tokens import (
    check_hash,
    check_same_tokens,
    check_vocabulary,
    texts_split_otherwise,
)

if TYPE_CHECKING:
    from heretic_kl.score.reference_run import CandidateTable, Observe, ReferenceRun, Watch

FLOOR = "floor across back ends"
FLOOR_TOKENS = 4096
"""So many tokens are enough to see how far two back ends are apart."""


def open_model(run: ReferenceRun, source: ModelSource, cache_type: str | None = None) -> LlamaModel:
    """A file, as the loader says, with room for every sequence, its tokens checked.

    Without `cache_type` keys and values are stored as a candidate's.

    Raises:
        ModelError: llama.cpp cannot load it.
        MeasurementError: another tokenizer.
    """
    path = source.gguf_file
    assert path is not None
    model = LlamaModel(
        path,
        context=max(len(sequence.fed) for sequence in run.sequences),
        cache_type=cache_type or run.loader.gguf_cache_type,
        on_gpu=run.loader.device != "cpu",
    )
    live = run.reference.logits
    if isinstance(live, LiveLogits):  # which has no text of its tokens but the file's
        check_same_tokens(live.model, model)
        model.block_rows = live.model.block_rows
        return model
    if run.tokenizer is None:
        check_hash(model, run.reference.identity.tokenizer_hash)
        return model
    check_vocabulary(model, run.tokenizer)
    sample = [sequence.fed for sequence in run.sequences[:64]]
    differing = texts_split_otherwise(model, run.tokenizer, sample)
    if differing:
        run.notify(
            f"llama.cpp splits {differing} of {len(sample)} texts into other tokens than the "
            f"reference's tokenizer; {model.name!r} is fed the reference's"
        )
    return model


def compare_natively(
    run: ReferenceRun,
    source: ModelSource,
    reduction: DivergenceReduction,
    *,
    floor: bool,
    watch: Watch | None = None,
    observe: Observe | None = None,
) -> CandidateTable:
    """Measure a file in llama.cpp.

    Args:
        run: the reference's side.
        source: a GGUF file.
        reduction: what is measured.
        floor: also run the file in `transformers`, as the reference ran, and compare the two. A
            quantized cache is no part of that: it is what the candidate is measured with.
        watch: see `ReferenceRun.compare`.
        observe: likewise.

    Raises:
        ModelError: llama.cpp cannot load it.
        MeasurementError: another tokenizer, or the reference has neither logits nor a head.
    """
    from heretic_kl.score.reference_run import CandidateTable

    run.head_for(run.reference.identity.vocabulary_size)  # refuses a reference without any
    apart = _floor(run, source, reduction) if floor else None
    model = open_model(run, source)
    try:
        table = _table(run, model, reduction, watch, observe)
    finally:
        model.close()
    return CandidateTable(table, kind_of(model, run.loader.gguf_cache_type), apart)


def _floor(run: ReferenceRun, source: ModelSource, reduction: DivergenceReduction) -> float | None:
    """Nats between `transformers` and llama.cpp on the same file; None: it was not measured."""
    beside = _in_transformers(run, source)
    if beside is None:
        return None
    cache_type = run.loader.gguf_cache_type
    model = open_model(beside, source, cache_type if cache_type in EXACT_CACHE_TYPES else "f16")
    try:
        return summarize(_table(beside, model, reduction, part=FLOOR)).mean
    finally:
        model.close()


def _table(
    run: ReferenceRun,
    model: LlamaModel,
    reduction: DivergenceReduction,
    watch: Watch | None = None,
    observe: Observe | None = None,
    part: str = "candidate",
) -> KLTable:
    head, size = run.head_for(model.vocabulary)
    return run.table(_blocks(model, run.told(part), size), head, reduction, watch, observe)


def _blocks(
    model: LlamaModel, sequences: Iterable[ForcedSequence], size: int
) -> Iterator[LogitBlock]:
    """Logits of the first `size` tokens, sequence by sequence."""
    row = 0
    for sequence in sequences:
        for logits in model.blocks(sequence):
            yield LogitBlock(torch.arange(row, row + len(logits)), logits[:, :size])
            row += len(logits)


def reference_in_llama(
    run: ReferenceRun, source: ModelSource, settings: Mapping[str, Any]
) -> Reference:
    """What a file says over a run's sequences, whenever it is asked: no logits are kept."""
    model = open_model(run, source)
    identity = replace(
        run.reference.identity,
        vocabulary_size=model.vocabulary,
        head_fingerprint=None,
        settings={**settings, "dtype": kind_of(model, run.loader.gguf_cache_type)},
    )
    live = LiveLogits(model, run.sequences, in_step=False)
    return replace(run.reference, identity=identity, hidden=None, logits=live)


def _in_transformers(run: ReferenceRun, source: ModelSource) -> ReferenceRun | None:
    """The same file, run as the reference was over the first of its sequences.

    None, with a notice: its unpacked weights are too large for what memory is free, or
    `transformers` cannot run it.
    """
    problem = _too_large(run, source)
    if problem is not None:
        run.notify(f"the floor across back ends is not measured: {problem}")
        return None
    count, tokens = 0, 0
    while count < len(run.sequences) and tokens < FLOOR_TOKENS:
        tokens += len(run.sequences[count].fed)
        count += 1
    try:
        beside = run.seen_by(source, sequences=run.sequences[:count], native=False)
    except (ModelError, MeasurementError) as error:
        run.notify(f"the floor across back ends is not measured: {error}")
        return None
    return replace(beside, notify=lambda message: None)  # the measurement itself says the same


def _too_large(run: ReferenceRun, source: ModelSource) -> str | None:
    """Why a file's unpacked weights do not fit in what memory is free; None: they may."""
    assert source.gguf_file is not None
    device = torch.device("cpu") if run.loader.device_map else resolve_device(run.loader.device)
    free, count = free_memory(device), gguf_weights(source.gguf_file).weights
    width = 4 if device.type == "cpu" else 2  # on a CPU they are unpacked as float32
    if free is None or not count or width * count <= free:
        return None
    return (
        f"unpacked, {source.gguf_file.name!r} takes {width * count / 1e9:.3g} GB, and "
        f"{free / 1e9:.3g} GB of memory are free"
    )
