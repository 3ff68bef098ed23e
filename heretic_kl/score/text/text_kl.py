"""KL of candidates from a reference over given text, instead of over the reference's responses.

Runs no model itself.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Unpack

from heretic_kl.errors import MeasurementError
from heretic_kl.files import new_file
from heretic_kl.kl import (
    Divergence,
    DivergenceReduction,
    Reference,
    ReferenceIdentity,
    vocabulary_hash,
)
from heretic_kl.kl.storage import undamaged
from heretic_kl.kl_options import checked_options
from heretic_kl.model import CausalModel
from heretic_kl.score.bands import measure_bands, measure_floor
from heretic_kl.score.comparison import MeasuresCandidates
from heretic_kl.score.llama.base_logits import (
    BaseLogits,
    window_sequence,
    write_head,
    write_rows,
)
from heretic_kl.score.llama.kld_rows import KLDAccumulator
from heretic_kl.score.llama.tokens import check_round_trip
from heretic_kl.score.loader import Loading, ModelLoader
from heretic_kl.score.reference_run import AnyRunner, ReferenceRun
from heretic_kl.score.stored import Store, StoredFacts
from heretic_kl.score.text.documents import Document, load_documents
from heretic_kl.score.text.windows import Window, cut_as_llama, cut_documents, first_token

TOKENS_AT_ONCE = 8192
"""Of all windows of a batch: their attention and hidden states are in memory together."""
NOISE_TOKENS = 4096
"""So many tokens are enough to see the size of a noise floor."""


class TextFacts(StoredFacts):
    """What a stored reference over text says of itself; see `_cut_of`."""

    text: str
    grouping: str
    context: int
    stride: int
    windows: str = Field(pattern="^[0-9]{1,9}( [0-9]{1,9})*$")
    """Of each document, as far as one has any."""


class TextKL(MeasuresCandidates):
    """KL(reference || candidate) over text, nats; every model reads the same tokens.

        kl = TextKL("path/to/original", ["wiki.test.raw", "code.jsonl"])
        measured = kl.score("path/to/quantization")

    Memory beyond the models' own grows with the scored positions times the width of a hidden
    state, never with the vocabulary, but for a model in vLLM: of that a window's logits are held.

    Args:
        reference: the original model, as for `TeacherForcedKL`.
        text: files, see `load_documents`, or the documents themselves.
        tokenizer: of the reference; needed where the reference is an object.
        context: tokens of a window.
        stride: of these, the last ones that are scored; windows begin so far apart.
        column: of the texts in tables.
        llama_windows: cut a single document as llama.cpp's program does, one window after the
            other, the second half of each scored, in place of `stride`; see `write_llama_base`.
        divergence: `forward_kl` is KL(reference || candidate).
        temperature: of both distributions.
        batch_size: most windows at once; fewer where they are long, halved where memory runs out.
        noise_floor: also measure what an unchanged model shows.
        bands: also measure the reference with its own weights rounded, see `Band`.
        loading: base, dtype, device, backend and so on, see `Loading`.

    Raises:
        HereticKLError: model or text cannot be used.
        ValueError: an argument is out of range.
    """

    _llama_ids: Sequence[Sequence[int]] = ()
    _documents: Sequence[int] = ()

    def __init__(
        self,
        reference: Any,
        text: Sequence[str | Path | Document],
        tokenizer: Any = None,
        *,
        context: int = 512,
        stride: int = 256,
        column: str | None = None,
        llama_windows: bool = False,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        batch_size: int = 16,
        noise_floor: bool = True,
        bands: bool = False,
        **loading: Unpack[Loading],
    ) -> None:
        checked_options(divergence=divergence, temperature=temperature)
        if not llama_windows and not 1 <= stride < context:
            raise ValueError(f"stride must be from 1 to context - 1, got {stride} of {context}")
        documents = _documents(text, column)
        if llama_windows and len(documents) != 1:
            raise MeasurementError(f"llama.cpp reads one text file, got {len(documents)} documents")
        self._reduction = DivergenceReduction(divergence, temperature)
        loader = ModelLoader(**loading)
        lm = loader.reference(
            reference, tokenizer, template="none", variables=None, response_prefix=""
        )
        if isinstance(lm, CausalModel):
            _require_positions(lm.model, context)
        if llama_windows:
            self._llama_ids = cut_as_llama(documents[0], lm.chat.tokenizer, context)
            first = first_token(lm.chat.tokenizer)
            windows = tuple(Window(window_sequence(ids, first), 0) for ids in self._llama_ids)
        else:
            windows = cut_documents(documents, lm.chat.tokenizer, context=context, stride=stride)
        self._group(documents, [window.document for window in windows])
        self._run = ReferenceRun.over(
            lm,
            lambda runner: [window.sequence for window in windows],
            max(len(window.sequence.response) for window in windows),
            {"model": loader.reference_name, **_cut_of(documents, context, stride)},
            loader=loader,
            batch_size=min(batch_size, max(1, TOKENS_AT_ONCE // context)),
            then=partial(self._measure_more, noise_floor, bands),
        )

    def save(self, path: str | Path, *, store: Store = "hidden") -> None:
        """As `StorableReference.save`; not of text that was cut with `llama_windows`, or by it."""
        if self._llama_ids or isinstance(self.reference.logits, BaseLogits):
            raise MeasurementError("text that was cut as llama.cpp does is stored in its own file")
        super().save(path, store=store)

    @classmethod
    def load(
        cls,
        path: str | Path,
        text: Sequence[str | Path | Document],
        tokenizer: Any = None,
        *,
        context: int = 512,
        stride: int = 256,
        column: str | None = None,
        **loading: Unpack[Loading],
    ) -> TextKL:
        """A saved reference, ready to measure candidates over the same text.

        Args:
            path: what `save` wrote.
            text: the files or documents that it was measured over; groups may have other names.
            tokenizer: of the reference, to show text with; not needed to measure.
            context: as it was.
            stride: as it was.
            column: of the texts in tables.
            loading: as for the constructor.

        Raises:
            MeasurementError: no such file, damaged, no reference, of another metric version or
                tokenizer, over responses, or over another text, grouping or windows; the message
                says what differs.
        """
        self = cls.__new__(cls)
        documents = _documents(text, column)
        facts = self._restore(path, tokenizer, loading, TextFacts)
        differences = [
            f"another {name} (stored {str(then)[:12]}, now {str(now)[:12]})"
            for name, now in _cut_of(documents, context, stride).items()
            if (then := getattr(facts, name)) != now
        ]
        if differences:
            raise MeasurementError(
                f"{path} does not fit: {', '.join(differences)}; measure with what it was stored "
                "with, or store the reference anew"
            )
        counts = [int(count) for count in facts.windows.split()]
        with undamaged(path):
            if sum(counts) != len(self.reference.mask) or len(counts) > len(documents):
                raise ValueError("its windows are not those of its text")
        self._group(documents, [place for place, n in enumerate(counts) for _ in range(n)])
        return self

    def _facts(self) -> dict[str, Any]:
        counts = Counter(self._documents)
        windows = " ".join(str(counts[index]) for index in range(max(counts) + 1))
        return {**super()._facts(), "windows": windows}

    def _group(self, documents: Sequence[Document], index: Sequence[int]) -> None:
        """Take up which document each window is of."""
        self._documents = index
        self._groups = [documents[place].group for place in index]
        self._clusters = _clusters(index, self._groups)

    @classmethod
    def from_llama_base(
        cls, path: str | Path, tokenizer: Any, *, batch_size: int = 16, **loading: Unpack[Loading]
    ) -> TextKL:
        """A reference of which there is llama.cpp's file of base logits, in place of its model.

        Tokens that the file clips, 16 nats below the best one, are left out of both models: what is
        measured is a lower bound. `Measurement.llama_rows` has llama.cpp's own figures.

        Args:
            path: what `llama-perplexity --save-all-logits` or `write_llama_base` wrote.
            tokenizer: of the candidates; that the file's token ids are its own is checked.
            batch_size: most windows at once.
            loading: as for the constructor.

        Raises:
            MeasurementError: it is no such file, or of another tokenizer.
        """
        base = BaseLogits.open(Path(path).expanduser())
        name = Path(path).name
        check_round_trip(name, tokenizer, base.tokens.tolist())
        self = cls.__new__(cls)
        self._reduction = DivergenceReduction()
        self._groups = [name] * len(base.tokens)
        self._clusters = torch.arange(len(base.tokens))
        sequences = base.sequences(first_token(tokenizer))
        tokens = torch.tensor([sequence.response for sequence in sequences])
        identity = ReferenceIdentity(
            vocabulary_hash(tokenizer.get_vocab()),
            base.vocabulary,
            settings={"model": None, "text": None, "dtype": "base logits of llama.cpp"},
        )
        self._run = ReferenceRun(
            Reference(
                tokens,
                torch.ones_like(tokens, dtype=torch.bool),
                identity,
                logits=base,
                prompts=torch.tensor([sequence.prompt for sequence in sequences]),
            ),
            ModelLoader(**loading),
            min(batch_size, max(1, TOKENS_AT_ONCE // base.context)),
            share_prefix=True,
            tokenizer=tokenizer,
            notify=loading.get("notify", lambda message: None),
        )
        return self

    def write_llama_base(self, path: str | Path) -> None:
        """Write llama.cpp's file of base logits of the reference, for `--kl-divergence-base`.

        Raises:
            ValueError: the text was not cut with `llama_windows`.
        """
        if not self._llama_ids:
            raise ValueError("a file of base logits needs a TextKL with llama_windows=True")
        with new_file(Path(path)) as partial, partial.open("wb") as file:
            write_head(file, self._llama_ids, self.reference.identity.vocabulary_size)
            for logits in self._run.reference_blocks():
                write_rows(file, logits)

    @property
    def reduction(self) -> DivergenceReduction:
        """What is measured, at which temperature."""
        return self._reduction

    @property
    def groups(self) -> tuple[str, ...]:
        """Files or categories, in order."""
        return tuple(dict.fromkeys(self._groups))

    def _accumulator(self) -> KLDAccumulator | None:
        base = self.reference.logits
        if isinstance(base, BaseLogits):
            return KLDAccumulator(base, self.reference.row_tokens)
        return None

    def _measure_more(
        self, noise_floor: bool, bands: bool, runner: AnyRunner, reference: Reference
    ) -> None:
        if noise_floor:
            windows = max(1, NOISE_TOKENS // _longest(reference))
            self.noise_floor = measure_floor(runner, reference, windows, self._reduction)
        if bands:
            clusters = self._clusters
            self.bands = measure_bands(runner, reference, self._reduction, clusters=clusters)


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


def _longest(reference: Reference) -> int:
    """Tokens of the longest window."""
    assert reference.prompts is not None
    return int(reference.prompts.shape[1] + reference.mask.shape[1])


def _require_positions(model: Any, context: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < context:
        raise MeasurementError(
            f"the reference reads at most {longest} tokens: pass a --context of no more"
        )


def _cut_of(documents: Sequence[Document], context: int, stride: int) -> dict[str, str | int]:
    """What decides which tokens are read, scored and grouped, beside the tokenizer.

    Texts and their grouping are told by hashes, groups by their order: a file may be renamed.
    """
    places: dict[str, int] = {}
    grouping = [places.setdefault(document.group, len(places)) for document in documents]
    text, grouped = (
        hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()
        for content in ([document.text for document in documents], grouping)
    )
    return {"text": text, "grouping": grouped, "context": context, "stride": stride}
