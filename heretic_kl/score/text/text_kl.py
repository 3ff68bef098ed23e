"""KL of candidates from a reference over given text, instead of over the reference's responses.

Runs no model itself.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from heretic_kl.engine import NoiseFloor, Runner, measure_noise_floor
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import Divergence, DivergenceReduction, Reference, group_means, summarize
from heretic_kl.kl_options import checked_options
from heretic_kl.model import DtypeName, likely_layers
from heretic_kl.score.loader import Loading, ModelLoader
from heretic_kl.score.measurement import Measurement
from heretic_kl.score.reference_run import ReferenceRun
from heretic_kl.score.text.documents import Document, load_documents
from heretic_kl.score.text.windows import cut_documents

TOKENS_AT_ONCE = 8192
"""Of all windows of a batch: their attention and hidden states are in memory together."""
NOISE_TOKENS = 4096
"""So many tokens are enough to see the size of a noise floor."""


class TextKL:
    """KL(reference || candidate) over text, nats; every model reads the same tokens.

        kl = TextKL("path/to/original", ["wiki.test.raw", "code.jsonl"])
        print(kl.score("path/to/quantization"))

    Memory beyond the models' own grows with the scored positions times the width of a hidden
    state, never with the vocabulary.

    Args:
        reference: the original model, as for `TeacherForcedKL`.
        text: files, see `load_documents`, or the documents themselves.
        tokenizer: of the reference; needed where the reference is an object.
        context: tokens of a window.
        stride: of these, the last ones that are scored; windows begin so far apart.
        column: of the texts in tables.
        divergence: `forward_kl` is KL(reference || candidate).
        temperature: of both distributions.
        batch_size: most windows at once; fewer where they are long, halved where memory runs out.
        noise_floor: also measure what an unchanged model shows.
        loading: base, dtype, device, backend and so on, see `Loading`.

    Raises:
        HereticKLError: model or text cannot be used.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        reference: Any,
        text: Sequence[str | Path | Document],
        tokenizer: Any = None,
        *,
        context: int = 512,
        stride: int = 256,
        column: str | None = None,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        batch_size: int = 16,
        noise_floor: bool = True,
        **loading: Unpack[Loading],
    ) -> None:
        checked_options(divergence=divergence, temperature=temperature)
        if not 1 <= stride < context:
            raise ValueError(f"stride must be from 1 to context - 1, got {stride} of {context}")
        documents = _documents(text, column)
        self.context, self.stride = context, stride
        self.noise_floor: NoiseFloor | None = None
        self._reduction = DivergenceReduction(divergence, temperature)
        loader = ModelLoader(**loading)
        lm = loader.reference(
            reference, tokenizer, template="none", enable_thinking=None, response_prefix=""
        )
        windows = cut_documents(documents, lm.chat.tokenizer, context=context, stride=stride)
        _require_positions(lm.model, context)
        self._groups = [documents[window.document].group for window in windows]
        self._clusters = _clusters([window.document for window in windows], self._groups)
        self._run = ReferenceRun.over(
            lm,
            lambda runner: [window.sequence for window in windows],
            stride,
            {"model": loader.reference_name, "text": _fingerprint(documents), "context": context},
            loader=loader,
            batch_size=min(batch_size, max(1, TOKENS_AT_ONCE // context)),
            then=self._measure_floor if noise_floor else lambda runner, reference: None,
        )

    @property
    def reference(self) -> Reference:
        """The windows, the scored positions and what the reference computed there."""
        return self._run.reference

    @property
    def reduction(self) -> DivergenceReduction:
        """What is measured, at which temperature."""
        return self._reduction

    @property
    def groups(self) -> tuple[str, ...]:
        """Files or categories, in order."""
        return tuple(dict.fromkeys(self._groups))

    def score(
        self,
        candidate: Any,
        tokenizer: Any = None,
        *,
        base: Any = None,
        dtype: DtypeName | None = None,
    ) -> Measurement:
        """Measure a candidate; see `TeacherForcedKL.score`."""
        floor = self.noise_floor
        compared = self._run.compare(
            candidate,
            tokenizer,
            reduction=self._reduction,
            base=base,
            dtype=dtype,
            floor=floor is not None,
        )
        table = replace(compared.table, clusters=self._clusters)
        return Measurement(
            summarize(table, noise_floor=None if floor is None else floor.value),
            table,
            floor,
            reference_dtype=self._run.dtype,
            candidate_dtype=compared.dtype,
            groups=group_means(table, self._groups),
            back_end_floor=compared.back_end_floor,
        )

    def _measure_floor(self, runner: Runner, reference: Reference) -> None:
        self.noise_floor = measure_noise_floor(
            runner,
            reference.first_prompts(max(1, NOISE_TOKENS // self.context)),
            likely_layers(runner.lm.model),
            divergence=self._reduction.divergence,
            temperature=self._reduction.temperature,
        )


def _documents(text: Sequence[str | Path | Document], column: str | None) -> Sequence[Document]:
    if isinstance(text, str | Path):
        raise ValueError(f"text must be a list of files or documents, got {text!r}")
    documents = [entry for entry in text if isinstance(entry, Document)]
    return [*documents, *load_documents([e for e in text if not isinstance(e, Document)], column)]


def _clusters(
    documents: Sequence[int],  # of each window
    groups: Sequence[str],  # of each window
) -> Tensor:
    """(P,) int64: a group's documents, or its windows where it has a single document."""
    documents_of = Counter(dict(zip(documents, groups, strict=True)).values())
    keys = [
        (document, None if documents_of[group] > 1 else window)
        for window, (document, group) in enumerate(zip(documents, groups, strict=True))
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])


def _require_positions(model: Any, context: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < context:
        raise MeasurementError(
            f"the reference reads at most {longest} tokens: pass a --context of no more"
        )


def _fingerprint(documents: Sequence[Document]) -> str:
    content = json.dumps([[document.text, document.group] for document in documents])
    return hashlib.sha256(content.encode("ascii")).hexdigest()
