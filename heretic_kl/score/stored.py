"""The reference's side of every comparison as a safetensors file, and back. Loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from heretic_kl.engine import NoiseFloor
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import DivergenceReduction, Head, Reference, vocabulary_hash
from heretic_kl.kl.reference import StoredLogits
from heretic_kl.model import free_memory
from heretic_kl.score.bands import Band, bands_of, stored_bands
from heretic_kl.score.llama.reference import LiveLogits
from heretic_kl.score.loader import Loading, ModelLoader
from heretic_kl.score.reference_run import ReferenceRun

Store: TypeAlias = Literal["hidden", "head", "logits"]
FACTS = frozenset(
    {"dtype", "divergence", "temperature", "position_decay", "batch_size", "share_prefix"}
)


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

    def _restore(self, path: str | Path, tokenizer: Any, loading: Loading) -> Mapping[str, Any]:
        """Become what was saved; return its settings.

        Raises:
            MeasurementError: no such file, no reference, of another metric version, or of another
                tokenizer than this one.
        """
        stored = Reference.load(path)
        facts: dict[str, Any] = dict(stored.identity.settings)
        if stored.prompts is None or not FACTS <= facts.keys():
            raise MeasurementError(f"{path} is a reference that heretic-kl score did not save")
        expected = stored.identity.tokenizer_hash
        if tokenizer is not None and vocabulary_hash(tokenizer.get_vocab()) != expected:
            raise MeasurementError(f"{path} is a reference of another tokenizer")
        self._reduction = DivergenceReduction(facts["divergence"], float(facts["temperature"]))
        self.position_decay = float(facts["position_decay"])
        floor = facts.get("batching_floor")
        self.noise_floor = None if floor is None else NoiseFloor(floor, facts["rounding_floor"])
        self.bands = bands_of(facts)
        self.refusal_openers = tuple(map(int, str(facts.get("refusal_openers", "")).split()))
        loader = ModelLoader(**loading)
        self._run = ReferenceRun(
            stored,
            loader,
            int(facts["batch_size"]),
            bool(facts["share_prefix"]),
            head=Head.load(path),
            tokenizer=tokenizer,
            notify=loader.notify,
            trees=bool(facts.get("trees", False)),
            packs=bool(facts.get("packed_weights", False)),
        )
        return facts


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
