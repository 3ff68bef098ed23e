"""The reference's side of every comparison as a safetensors file, and back. Loads no model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from heretic_kl.engine import NoiseFloor
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import DivergenceReduction, Head, Reference, vocabulary_hash
from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
from heretic_kl.kl.reference import StoredLogits
from heretic_kl.kl.storage import undamaged
from heretic_kl.kl.terms import row_blocks
from heretic_kl.kl_options import KLOptions, checked
from heretic_kl.model import free_memory
from heretic_kl.score.bands import Band, bands_of, floor_of, stored_bands
from heretic_kl.score.llama.reference import LiveLogits
from heretic_kl.score.loader import Loading, ModelLoader
from heretic_kl.score.reference_run import ReferenceRun

Store: TypeAlias = Literal["hidden", "head", "logits"]
FACTS = frozenset(
    {"dtype", "divergence", "temperature", "position_decay", "batch_size", "share_prefix"}
)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class StoredFacts(KLOptions):
    """What a file says beside its tensors, each fact of its own kind."""

    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    dtype: str
    batch_size: int = Field(ge=1, lt=2**31)
    share_prefix: bool
    trees: bool = False
    packed_weights: bool = False
    refusal_openers: str = Field("", pattern="^([0-9]{1,9}( [0-9]{1,9})*)?$")

    @property
    def openers(self) -> tuple[int, ...]:
        """First tokens of refusals."""
        return tuple(map(int, self.refusal_openers.split()))


FactsT = TypeVar("FactsT", bound=StoredFacts)


class StorableReference:
    """What measuring needs of a reference, and its way into a file and back."""

    position_decay = 1.0
    refusal_openers: tuple[int, ...] = ()
    noise_floor: NoiseFloor | None = None
    bands: tuple[Band, ...] = ()
    _run: ReferenceRun
    _reduction: DivergenceReduction

    @property
    def reference(self) -> Reference:
        """What is fed, the scored positions and what the reference computed there."""
        return self._run.reference

    def save(self, path: str | Path, *, store: Store = "hidden") -> None:
        """Keep the reference as a safetensors file, to measure candidates without the model.

        Hidden states take rows * D numbers of the model's dtype, the head V * D more; logits take
        rows * V * 2 bytes, and twice that in memory while they are stored.

        Args:
            path: where to.
            store: `hidden` states are lossless, and good for candidates with the same head. With
                the `head` they are good for any. `logits` (float16) are good for any, too; a
                reference in llama.cpp has nothing else.

        Raises:
            MeasurementError: head or logits are wanted of a reference that was itself loaded
                without its head, or memory is too small for the logits.
        """
        live = isinstance(self.reference.logits, LiveLogits)
        if live and store != "logits":
            raise MeasurementError(
                "a reference in llama.cpp has no hidden states to store: store logits "
                "(--store logits)"
            )
        if store == "head" and (self._run.head is None or self.reference.hidden is None):
            raise MeasurementError("the head can only be stored where it is known, with its states")
        if store == "logits" and not isinstance(self.reference.logits, StoredLogits):
            size = self.reference.identity.vocabulary_size
            has_hidden = self.reference.hidden is not None
            require_memory(self.reference.rows, size, has_hidden=has_hidden)
        stored = self._run.with_logits() if store == "logits" else self.reference
        head = self._run.head if store == "head" else None
        settings = {**stored.identity.settings, **self._facts()}
        stored = replace(stored, identity=replace(stored.identity, settings=settings))
        stored.save(path, None if head is None else head.columns())

    def _facts(self) -> dict[str, Any]:
        """What the file says beside the reference's own settings."""
        floor = self.noise_floor
        return {
            "divergence": self._reduction.divergence,
            "temperature": self._reduction.temperature,
            "position_decay": self.position_decay,
            "batch_size": self._run.batch_size,
            "share_prefix": self._run.share_prefix,
            "trees": self._run.trees,
            "packed_weights": self._run.packs,
            "refusal_openers": " ".join(map(str, self.refusal_openers)),
            **stored_bands(self.bands),
            **({} if floor is None else {"batching_floor": floor.batching}),
            **({} if floor is None else {"rounding_floor": floor.rounding}),
        }

    def _restore(
        self, path: str | Path, tokenizer: Any, loading: Loading, kind: type[FactsT]
    ) -> FactsT:
        """Become what was saved; return what the file says, as `kind`.

        Raises:
            MeasurementError: no such file, damaged, no reference, of another kind or metric
                version, or of another tokenizer than this one.
        """
        stored, head = Reference.load(path), Head.load(path)
        settings = stored.identity.settings
        if stored.prompts is None or not FACTS <= settings.keys():
            raise MeasurementError(f"{path} is a reference that heretic-kl score did not save")
        if "text" in settings and "text" not in kind.model_fields:
            raise MeasurementError(f"{path} was stored over text: name the same files with --text")
        if "text" in kind.model_fields and "text" not in settings:
            raise MeasurementError(f"{path} was stored over responses: leave out --text")
        with undamaged(path):
            facts = checked(kind, settings)
            _require_whole(stored, facts.openers)
            _require_head(stored, head)
            self.noise_floor, self.bands = floor_of(settings), bands_of(settings)
        expected = stored.identity.tokenizer_hash
        if tokenizer is not None and vocabulary_hash(tokenizer.get_vocab()) != expected:
            raise MeasurementError(f"{path} is a reference of another tokenizer")
        self._reduction = DivergenceReduction(facts.divergence, facts.temperature)
        self.position_decay, self.refusal_openers = facts.position_decay, facts.openers
        loader = ModelLoader(**loading)
        self._run = ReferenceRun(
            stored,
            loader,
            facts.batch_size,
            facts.share_prefix,
            head=head,
            tokenizer=tokenizer,
            notify=loader.notify,
            trees=facts.trees,
            packs=facts.packed_weights,
        )
        return facts


def _require_whole(stored: Reference, openers: Sequence[int]) -> None:
    """Raise `ValueError` unless what is fed and what the reference computed can be used.

    Args:
        stored: with its prompts.
        openers: token ids with which refusals begin.
    """
    size, prompts = stored.identity.vocabulary_size, stored.prompts
    assert prompts is not None
    if not _from_the_start(stored.mask) or not _from_the_start(prompts >= 0):
        raise ValueError("a prompt or a response has no tokens, or a gap")
    least = min(int(stored.tokens.min()), int(prompts.min()) + 1)
    if least < 0 or max(int(stored.tokens.max()), int(prompts.max()), *openers) >= size:
        raise ValueError(f"token ids must be 0 or more, and below {size}, the vocabulary's size")
    if stored.hidden is not None:
        _require_numbers("hidden states", stored.hidden)
    if isinstance(stored.logits, StoredLogits):
        shifted, normalizers = stored.logits
        normal = (normalizers >= 0.0) & (normalizers <= math.log(size) + 1e-6)
        if not bool((normal & (shifted.amax(dim=1) == 0.0)).all()):
            raise ValueError("the logits of a position are no distribution")


def _require_head(stored: Reference, head: Head | None) -> None:
    """Raise `ValueError` unless hidden states come with their own head, or say which it is."""
    identity, hidden = stored.identity, stored.hidden
    if hidden is not None and identity.head_fingerprint is None:
        raise ValueError("it does not say which head its hidden states are for")
    if head is None:
        return
    for part in (head.weight, head.bias):
        if part is not None:
            _require_numbers("head", part[: head.vocabulary])
    width = None if hidden is None else int(hidden.shape[1])
    if (int(head.weight.shape[1]), head.vocabulary, head.fingerprint()) != (
        (width, identity.vocabulary_size, identity.head_fingerprint)
    ):
        raise ValueError("its head is not the one that its hidden states are for")


def _from_the_start(inside: Tensor) -> bool:
    """Whether each row of (P, T) bool is True at first, at least once, and then False."""
    lengths = inside.sum(dim=1, keepdim=True)
    first = torch.arange(inside.shape[1]) < lengths
    return inside.numel() > 0 and bool((lengths > 0).all()) and torch.equal(inside, first)


def _require_numbers(what: str, values: Tensor) -> None:
    """Raise `ValueError` unless it is a tensor of finite numbers; few are looked at at once."""
    whole = values.dtype in FLOATS and values.numel() > 0
    blocks = row_blocks(len(values), values[:1].numel(), MAX_LOGIT_ELEMENTS)
    if not whole or not all(bool(torch.isfinite(values[block]).all()) for block in blocks):
        raise ValueError(f"{what} must be finite floating-point numbers")


def require_memory(rows: int, vocabulary: int, *, has_hidden: bool, most: str = "") -> None:
    """Refuse logits that do not fit in memory while they are stored.

    Args:
        rows: scored positions.
        vocabulary: V.
        has_hidden: hidden states could be stored instead.
        most: said before `rows` where these are the most that there can be.
    """
    needed = 4 * rows * vocabulary
    free = free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        instead = "store the head (--store head)" if has_hidden else "measure less"
        raise MeasurementError(
            f"logits of {most}{rows} positions take {most}{needed / 1e9:.3g} GB of memory, and "
            f"{free / 1e9:.3g} GB are free: {instead}"
        )
