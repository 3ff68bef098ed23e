"""What is known of a reference, and what candidates must share with it. Runs no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

from heretic_kl.engine import forced_sequences
from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError
from heretic_kl.kl import Head, Reference, ReferenceIdentity
from heretic_kl.model import DtypeName
from heretic_kl.score.detail import ForcedInputs
from heretic_kl.score.loader import ModelLoader

HEAD_NEEDED = (
    "a stored reference of hidden states alone cannot be compared with a model in llama.cpp, in "
    "vLLM or behind a server: store its head, too (--store head)"
)


@dataclass
class ReferenceSide:
    """The reference's side of every comparison: only token ids, hidden states and the head."""

    reference: Reference
    loader: ModelLoader
    batch_size: int
    share_prefix: bool
    head: Head | None = None
    """Of the reference; None: it was loaded from a file."""
    tokenizer: Any = None
    notify: Callable[[str], None] = lambda message: None
    trees: bool = False
    """Sequences run as trees of tokens."""
    packs: bool = False
    """Weights are laid out for the CPU."""
    candidate_dtype: DtypeName | None = None
    """Of candidates where none is asked for; None: the reference's. In a chain the first one's."""

    @cached_property
    def sequences(self) -> tuple[ForcedSequence, ...]:
        """What every model is fed."""
        return forced_sequences(self.reference)

    def inputs(self, names: Sequence[str] = ()) -> ForcedInputs:
        """The same for people; `names` are what users asked."""
        return ForcedInputs(self.sequences, self.tokenizer, names)

    def told(self, part: str) -> Iterator[ForcedSequence]:
        """What is fed, one by one; the loader's `progress` is told of each as `part`."""
        for done, sequence in enumerate(self.sequences):
            self.loader.progress(part, done, len(self.sequences))
            yield sequence
        self.loader.progress(part, len(self.sequences), len(self.sequences))

    @property
    def in_llama(self) -> bool:
        """Whether llama.cpp computed what the reference says."""
        return self.dtype.endswith("llama.cpp")

    @property
    def dtype(self) -> str:
        """What the reference computed in, for instance `bfloat16`."""
        return str(self.reference.identity.settings["dtype"])

    def head_for(self, vocabulary: int) -> tuple[Head | None, int]:
        """The reference's head, and how many of so many tokens of a candidate it can be told from.

        None: the reference has logits.
        """
        if self.reference.logits is not None:
            self.require(vocabulary_size=vocabulary)
            return None, vocabulary
        if self.head is None:
            raise MeasurementError(HEAD_NEEDED)
        if vocabulary == self.head.vocabulary:
            return self.head, vocabulary
        size = self._common_size(vocabulary)
        return replace(self.head, vocabulary_size=size), size

    def dtype_for_candidates(self) -> DtypeName | None:
        """The reference's where no other is asked for: a KL should not measure two dtypes."""
        if self.loader.dtype != "auto":
            return None
        by_name: dict[str, DtypeName] = {name: name for name in get_args(DtypeName)}
        return self.candidate_dtype or by_name.get(self.dtype)

    def heads(self, candidate_head: Head) -> tuple[Head, Head]:
        """Reference's and candidate's head, on the candidate's device, of one vocabulary."""
        if self.reference.logits is not None:
            self.require(vocabulary_size=candidate_head.vocabulary)
            return candidate_head, candidate_head
        if self.head is None:
            self.require(
                vocabulary_size=candidate_head.vocabulary,
                head_fingerprint=candidate_head.fingerprint(),
            )
            states, width = self.reference.hidden, int(candidate_head.weight.shape[1])
            if states is None or states.shape[1] != width:
                raise MeasurementError(
                    f"the stored reference is damaged: its hidden states are not {width} wide, as "
                    "its head takes them; store it anew"
                )
            return candidate_head, candidate_head
        head = self.head.to(candidate_head.weight.device)
        if candidate_head.vocabulary != self.reference.identity.vocabulary_size:
            size = self._common_size(candidate_head.vocabulary)
            cut = replace(candidate_head, vocabulary_size=size)
            return replace(head, vocabulary_size=size), cut
        if head.same_as(candidate_head):
            return candidate_head, candidate_head
        return (head.with_packed_weight() if self.packs else head), candidate_head

    def _common_size(self, vocabulary: int) -> int:
        """Tokens that both have where the heads are padded to different sizes."""
        identity = self.reference.identity
        size = 0 if self.tokenizer is None else len(self.tokenizer)
        used = int(self.reference.tokens.max())
        if not used < size <= min(identity.vocabulary_size, vocabulary):
            raise MeasurementError(
                f"the models have different vocabularies: {identity.vocabulary_size} tokens in the "
                f"reference, {vocabulary} in the candidate"
            )
        self.notify(
            f"the heads have {identity.vocabulary_size} and {vocabulary} columns; the "
            f"tokenizer's {size} tokens are compared"
        )
        return size

    def require(self, **facts: Any) -> None:
        """Refuse a candidate whose facts differ from the reference's.

        Raises:
            MeasurementError: which of them do.
        """
        identity = self.reference.identity
        expected = ReferenceIdentity(
            **{
                "tokenizer_hash": identity.tokenizer_hash,
                "vocabulary_size": identity.vocabulary_size,
                "settings": identity.settings,
                **facts,
            }
        )
        identity.require_match(
            expected,
            problem="the candidate cannot be compared with the reference",
            sides=("reference", "candidate"),
            remedy="only models with one tokenizer can be compared"
            if "head_fingerprint" not in facts
            else "store the reference's head with its hidden states (--store head)",
        )
