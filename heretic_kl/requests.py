"""What scorers ask of a model and what the engine answers. Knows nothing about either of them.

A scorer declares requests and never touches the model, so the engine is free to merge equal
requests, to run cheap ones before dear ones and to stop a row once its verdict is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from heretic_kl.prompts import Prompt

RowReduction: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]
"""(reference logits (rows, V) float32, candidate logits (rows, V) float32, reference tokens
(rows,)) -> columns (rows,), one number a row each; a NamedTuple keeps its type. Called on chunks
of rows: (P, N, V) logits are never held at once."""


class PreparingReduction(Protocol):
    """A reduction whose work on the reference's logits alone is worth doing once."""

    def prepare(self, reference: Tensor) -> Prepared:
        """What it is given in place of reference logits (rows, V), for every candidate."""
        ...


class Prepared(Protocol):
    """What a reduction made of reference logits; kept as long as memory allows."""

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        ...


class StopRule(Protocol):
    """Tells whether more text could still change a verdict."""

    def decided(self, text: str) -> bool:
        """True once no continuation of `text` can change the verdict. Never a guess."""
        ...


@dataclass(frozen=True)
class Sampling:
    """The reference's responses are drawn from its own distribution, at temperature 1.

    A greedy response is what a user of the model sees; over drawn responses the sum over positions
    is an unbiased estimate of the KL between whole responses.
    """

    seed: int
    """What is drawn for a prompt depends on this and on the prompt, not on the others."""


@dataclass(frozen=True)
class TeacherForcedRequest:
    """The reference's own response, fed to both models, compared position by position."""

    prompts: tuple[Prompt, ...]
    tokens: int
    """N, positions scored for each prompt; fewer where the response ends earlier."""
    reduction: RowReduction
    """What is kept of each row's logits; see also `PreparingReduction`. Requests are equal only if
    this is."""
    sampling: Sampling | None = None
    """How the reference responds; None: greedily."""
    reference_logits: bool = True
    """Whether the reduction reads them; False: they are not computed, it is given none (0, V)."""


@dataclass(frozen=True)
class TeacherForcedResult:
    """Statistics of every scored position, rows ordered by prompt, then position."""

    columns: tuple[Tensor, ...]
    """Of the reduction's own type, each (rows,)."""
    prompt_index: Tensor
    """(rows,) int64, into the request's prompts."""
    position: Tensor
    """(rows,) int64, 0 for the first response token."""


@dataclass(frozen=True)
class ResponseRequest:
    """Greedy responses, each until it ends, `max_tokens` are there or its verdict is known."""

    prompts: tuple[Prompt, ...]
    max_tokens: int
    stop: StopRule | None = None


@dataclass(frozen=True)
class ResponseResult:
    """One response a prompt."""

    texts: tuple[str, ...]
    """Special tokens removed. A response stopped by its rule is cut where it was decided."""


class ModelProgram(Protocol):
    """A measurement that runs a model by itself; hashable, equal if it measures the same."""

    def __call__(self, model: Any, tokenizer: Any) -> tuple[float, ...]:
        """One value for each item, from a `transformers` model as it is and its tokenizer."""
        ...


@dataclass(frozen=True)
class ModelRequest:
    """What a program that knows models finds, such as a benchmark; runs last, alone.

    For what the other requests cannot say. The edit is in force meanwhile; nothing is shared with
    other requests or candidates.
    """

    program: ModelProgram


@dataclass(frozen=True)
class ModelResult:
    """One value for each item of the program."""

    values: tuple[float, ...]


@dataclass(frozen=True)
class PartialRows:
    """What of a `TeacherForcedRequest` was run so far."""

    rows: TeacherForcedResult
    """Of some of the prompts; of each of these, all its positions."""


@dataclass(frozen=True)
class PartialResponses:
    """What of a `ResponseRequest` was generated so far."""

    texts: tuple[str, ...]
    """One a prompt, as far as it is there; "" where nothing is."""
    over: tuple[bool, ...]
    """Whether this is the whole response, or all that its rule needs."""


Request: TypeAlias = TeacherForcedRequest | ResponseRequest | ModelRequest
Result: TypeAlias = TeacherForcedResult | ResponseResult | ModelResult
SoFar: TypeAlias = Result | PartialRows | PartialResponses | None
"""A result, a part of it, or nothing yet."""

Watch: TypeAlias = Callable[[int, Sequence[SoFar]], bool]
"""(candidate, what is there so far of each request, in order) -> True: measure it no further."""
