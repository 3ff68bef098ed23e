"""The original model's side of a measurement: given, loaded from a file, or computed.

A reference holds the response that was forced on both models, which of its positions are scored,
and what the original said there: its final hidden states (small and lossless, good as long as
the head is the same), or its logits in float16 (where the head may change). It knows nothing
about models and tokenizers but the hashes by which two of them can be told apart.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS, REFERENCE_KIND, Head
from heretic_kl.kl.rows import empty_rows, row_statistics
from heretic_kl.kl.storage import ReferenceIdentity, load_tensors, save_tensors, undamaged
from heretic_kl.kl.table import KLTable
from heretic_kl.kl.terms import (
    Divergence,
    log_normalizer,
    require_finite,
    row_blocks,
    working,
    working_dtype,
)

_LOWEST_FLOAT16: Final = -65504.0


class StoredLogits(NamedTuple):
    """Logits in half the size: `log p = shifted - log_normalizer`.

    Shifting by each row's maximum puts float16's fine steps where the probability is. Rounding
    still leaves a model some 1e-7 nats from itself: where the head is known, hidden states
    are better.
    """

    shifted: Tensor  # (rows, V) float16, logits minus the row's maximum, at most 0
    log_normalizer: Tensor  # (rows,) float64, of the shifted logits before rounding

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.shifted.shape[0])

    def require_rows(self, vocabulary: int) -> None:
        """Raise `ValueError` unless they are (rows, vocabulary) and (rows,), each of its dtype."""
        shape, normalizers = tuple(self.shifted.shape), tuple(self.log_normalizer.shape)
        if (len(shape), shape[1:], normalizers) != (2, (vocabulary,), shape[:1]):
            raise ValueError(
                f"logits must be (rows, {vocabulary}) with a normalizer each, got {shape} and "
                f"{normalizers}"
            )
        if (self.shifted.dtype, self.log_normalizer.dtype) != (torch.float16, torch.float64):
            raise ValueError("logits must be float16, their normalizers float64")

    def of(self, rows: Tensor) -> Tensor:
        """Return log-probabilities of some rows, float32."""
        normalizer = self.log_normalizer[rows].to(torch.float32)
        return self.shifted[rows].to(torch.float32) - normalizer.unsqueeze(-1)


class RowLogits(Protocol):
    """A reference's logits, stored in whatever way or computed when they are asked for."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    def of(self, rows: Tensor) -> Tensor:
        """Return raw logits, or log-probabilities, of some rows (n,) int64: (n, V)."""


class LogitBlock(NamedTuple):
    """A candidate's logits at some scored positions."""

    rows: Tensor  # (n,) int64, among the reference's rows
    logits: Tensor  # (n, V) raw


@dataclass(frozen=True, eq=False)
class Reference:
    """The forced responses and what the original model said at their scored positions.

    Rows are the scored positions, prompt by prompt: `mask.nonzero()`. Exactly one of `hidden`
    and `logits` is there; build with `from_hidden` or `from_logits`.
    """

    tokens: Tensor  # (P, N) int64, the original's own responses
    mask: Tensor  # (P, N) bool, up to and including the position predicting the end token
    identity: ReferenceIdentity
    hidden: Tensor | None = None  # (rows, D) after the final norm
    logits: RowLogits | None = None
    prompts: Tensor | None = None  # (P, T) int64 token ids, -1 after each prompt's last

    def __post_init__(self) -> None:
        """Raise `ValueError` if the parts do not fit together."""
        if self.tokens.dim() != 2 or self.tokens.shape != self.mask.shape:
            raise ValueError(
                f"tokens and mask must both be (P, N), got {tuple(self.tokens.shape)} and "
                f"{tuple(self.mask.shape)}"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {self.mask.dtype}")
        for name, ids in (("tokens", self.tokens), ("prompts", self.prompts)):
            if ids is not None and ids.dtype != torch.int64:
                raise ValueError(f"{name} must be int64, got {ids.dtype}")
        if self.prompts is not None and (
            self.prompts.dim() != 2 or self.prompts.shape[0] != self.mask.shape[0]
        ):
            raise ValueError(
                f"prompts must be ({self.mask.shape[0]}, T) to fit the mask, got "
                f"{tuple(self.prompts.shape)}"
            )
        if (self.hidden is None) == (self.logits is None):
            raise ValueError("a reference holds either hidden states or logits")
        if self.hidden is not None and self.hidden.dim() != 2:
            raise ValueError(f"hidden states must be (rows, D), got {tuple(self.hidden.shape)}")
        rows = self.hidden.shape[0] if self.hidden is not None else 0
        if self.logits is not None:
            rows = self.logits.rows
        if rows != self.rows:
            raise ValueError(
                f"hidden states or logits must be ({self.rows}, ...) to fit the mask's scored "
                f"positions, got {rows} rows"
            )

    @classmethod
    def from_hidden(
        cls,
        tokens: Tensor,  # (P, N) integer
        mask: Tensor,  # (P, N) bool
        hidden: Tensor,  # (rows, D) after the final norm
        identity: ReferenceIdentity,
        prompts: Tensor | None = None,  # (P, T) token ids, -1 after each prompt's last
    ) -> "Reference":
        """Return a reference of hidden states; `identity` should name the head's fingerprint."""
        return cls(tokens.to(torch.int64), mask, identity, hidden=hidden, prompts=prompts)

    @classmethod
    @torch.no_grad()
    def from_logits(
        cls,
        tokens: Tensor,  # (P, N) integer
        mask: Tensor,  # (P, N) bool
        chunks: Iterable[Tensor],  # each (some rows, V) raw logits, in the rows' order
        identity: ReferenceIdentity,
        prompts: Tensor | None = None,  # (P, T) token ids, -1 after each prompt's last
    ) -> "Reference":
        """Return a reference of float16 logits on the CPU, written where they stay.

        Raises:
            MeasurementError: A row holds NaN or +inf, or only -inf.
            ValueError: There are fewer rows than scored positions.
        """
        rows, end = int(mask.sum()), 0
        shifted = torch.empty(rows, identity.vocabulary_size, dtype=torch.float16)
        normalizers = torch.empty(rows, dtype=torch.float64)
        for chunk in chunks:
            place = slice(end, end := end + len(chunk))
            wide = working(chunk, working_dtype(chunk.dtype, chunk.dtype), 1.0)
            low = wide - wide.amax(dim=-1, keepdim=True)
            normalizers[place] = normalizer = log_normalizer(low)
            require_finite(normalizer, "reference")
            floor = low.clamp(min=_LOWEST_FLOAT16).masked_fill(low == -torch.inf, -torch.inf)
            shifted[place] = floor.to(torch.float16)
        if end != rows or not rows:
            raise ValueError(f"chunks must hold {rows} rows in all, at least one, got {end}")
        stored = StoredLogits(shifted, normalizers)
        return cls(tokens.to(torch.int64), mask, identity, logits=stored, prompts=prompts)

    @property
    def rows(self) -> int:
        """Number of scored positions."""
        return int(self.mask.sum())

    @property
    def row_tokens(self) -> Tensor:
        """(rows,) int64: the reference token at each scored position."""
        return self.tokens[self.mask]

    @property
    def prompt_index(self) -> Tensor:
        """(rows,) int64: which prompt each row belongs to."""
        return self.mask.nonzero()[:, 0]

    @property
    def position(self) -> Tensor:
        """(rows,) int64: each row's position in its response, from 0."""
        return self.mask.nonzero()[:, 1]

    def with_hidden(self, hidden: Tensor) -> "Reference":
        """Return the same responses as another model sees them, to compare a third with that."""
        return replace(self, hidden=hidden, logits=None)

    def first_prompts(self, count: int) -> "Reference":
        """Return the reference of the first `count` prompts, of all if there are fewer."""
        mask = self.mask[:count]
        rows = int(mask.sum())
        logits = None
        if self.logits is not None:
            assert isinstance(self.logits, StoredLogits)
            logits = StoredLogits(*(column[:rows] for column in self.logits))
        return replace(
            self,
            tokens=self.tokens[:count],
            mask=mask,
            hidden=None if self.hidden is None else self.hidden[:rows],
            logits=logits,
            prompts=None if self.prompts is None else self.prompts[:count],
        )

    def measure(
        self,
        candidate_hidden: Tensor,  # (rows, D) after the final norm, in the rows' order
        *,
        head: Head,
        candidate_head: Head | None = None,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        max_elements: int = MAX_LOGIT_ELEMENTS,
    ) -> KLTable:
        """Return the (P, N) table of the candidate against this reference, in nats.

        The candidate goes through `candidate_head`, or `head` if it has none of its own. Stored
        hidden states go through `head`: check its fingerprint once with `require_match`.

        Raises:
            ValueError: Shapes do not fit; both are named.
            MeasurementError: A row of logits holds NaN or +inf, or only -inf.
        """
        other_head = head if candidate_head is None else candidate_head
        if candidate_hidden.shape[:1] != (self.rows,):
            raise ValueError(
                f"candidate_hidden must be ({self.rows}, D), got {tuple(candidate_hidden.shape)}"
            )
        if self.hidden is not None and other_head.vocabulary != head.vocabulary:
            raise ValueError(
                f"both heads must have one vocabulary, got {head.vocabulary} and "
                f"{other_head.vocabulary}"
            )
        places = torch.arange(self.rows)
        return self.measure_blocks(
            (
                LogitBlock(places[block], other_head.logits(candidate_hidden[block]))
                for block in row_blocks(self.rows, other_head.vocabulary, max_elements)
            ),
            head=head,
            divergence=divergence,
            temperature=temperature,
        )

    def measure_blocks(
        self,
        blocks: Iterable[LogitBlock],
        *,
        head: Head | None = None,
        divergence: Divergence = "forward_kl",
        temperature: float = 1.0,
        observe: Callable[[Tensor, Tensor, Tensor], None] | None = None,
    ) -> KLTable:
        """Return the (P, N) table of a candidate whose logits come block by block, in nats.

        Holds no more logits than those of one block, of reference and candidate.

        Args:
            blocks: All rows, each once, in any order.
            head: Puts stored hidden states in the same blocks as the candidate's.
            divergence: Which divergence.
            temperature: Both logits are divided by it.
            observe: Shown rows (n,), the reference's and the candidate's logits (n, V) of a block.

        Raises:
            ValueError: Shapes do not fit, or rows are missing.
            MeasurementError: A row of logits holds NaN or +inf, or only -inf.
        """
        statistics = empty_rows(self.rows, torch.device("cpu"))
        tokens, missing = self.row_tokens, torch.ones(self.rows, dtype=torch.bool)
        for rows, logits in blocks:
            reference = self.logits_of(rows, head).to(logits.device)
            if observe is not None:
                observe(rows, reference, logits)
            part = row_statistics(
                reference, logits, tokens[rows], divergence=divergence, temperature=temperature
            )
            # Kept results of a few bytes among freed chunks of megabytes would fragment the heap.
            for column, values in zip(statistics, part, strict=True):
                column[rows] = values.to(column.device)
            missing[rows] = False
        if bool(missing.any()):
            raise ValueError(f"{int(missing.sum())} of {self.rows} rows are missing")
        return KLTable.from_rows(
            statistics,
            self.prompt_index,
            self.position,
            *self.mask.shape,
            divergence=divergence,
            temperature=temperature,
        )

    def logits_of(self, rows: Tensor, head: Head | None) -> Tensor:
        """Return the reference's logits (n, V) of rows (n,)."""
        if self.logits is not None:
            return self.logits.of(rows)
        if head is None:
            raise ValueError("hidden states need a head")
        assert self.hidden is not None
        return head.logits(self.hidden[rows.to(self.hidden.device)])

    def save(self, path: str | Path, more: Mapping[str, Tensor] | None = None) -> None:
        """Write the reference as safetensors, in one step; `more` as of `Head.columns`."""
        tensors = {"tokens": self.tokens, "mask": self.mask, **(more or {})}
        if self.hidden is not None:
            tensors["hidden"] = self.hidden
        if self.prompts is not None:
            tensors["prompts"] = self.prompts
        if self.logits is not None:
            if not isinstance(self.logits, StoredLogits):
                raise MeasurementError("only logits that are held in memory can be stored")
            tensors.update(self.logits._asdict())
        facts = {**asdict(self.identity), "settings": dict(self.identity.settings)}
        save_tensors(path, REFERENCE_KIND, tensors, facts)

    @classmethod
    def load(cls, path: str | Path) -> "Reference":
        """Read a saved reference; see `ReferenceIdentity.require_match`.

        Raises:
            MeasurementError: The file is missing, damaged, no reference, or of another metric
                version.
        """
        tensors, facts = load_tensors(path, REFERENCE_KIND)
        with undamaged(path):
            identity = ReferenceIdentity(**cast(dict[str, Any], facts))
            stored = None
            if "shifted" in tensors:
                stored = StoredLogits(tensors["shifted"], tensors["log_normalizer"])
                stored.require_rows(identity.vocabulary_size)
            return cls(
                tensors["tokens"],
                tensors["mask"],
                identity,
                hidden=tensors.get("hidden"),
                logits=stored,
                prompts=tensors.get("prompts"),
            )
