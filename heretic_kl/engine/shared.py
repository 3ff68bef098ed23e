"""What the unedited model responds and computes, computed once for all processes of a study.

Each result is looked for under a hash of everything that it depends on. What is not there, or
cannot be what is looked for, is computed. Knows no plans: nothing of an edited model comes here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from heretic_kl import ranks
from heretic_kl.engine.generation.generate import Response
from heretic_kl.errors import StorageLostError, StudyError
from heretic_kl.model import LanguageModel
from heretic_kl.model.loading.devices import processor
from heretic_kl.prompts import Prompt
from heretic_kl.requests import Sampling, StopRule


class Store(Protocol):
    """Tensors by a hash of 64 hex digits."""

    def load(self, key: str) -> dict[str, Tensor] | None:
        """What was saved under a hash, None where nothing was; StudyError: it is unusable."""
        ...

    def save(
        self,
        key: str,
        about: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        replace: bool = False,
    ) -> bool:
        """Keep tensors and JSON-ready words about them, unless another process was first.

        Returns whether these are kept now; StudyError: they cannot be.
        """
        ...


@dataclass(frozen=True)
class SharedResults:
    """Results of one unedited model.

    Responses and residuals may come from any process with the same model, dtype, kind of device
    and versions: the study then has one reference and one set of directions. Hidden states are
    compared with a candidate's to the last bit, so that they come from the same arithmetic alone.

    Args:
        store: where they are; None: each is computed here.
        identity: what all of them depend on, JSON-ready.
        notify: told, in words, what cannot be used or kept.
        kept_of: prompts whose responses may be on a disk, as may be what tells a token of them
            (states at single positions; a mean does not); None: all. Other results are computed
            here.
    """

    store: Store | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    notify: Callable[[str], None] = lambda message: None
    kept_of: frozenset[Prompt] | None = None

    def responses(
        self,
        prompts: Iterable[Prompt],
        encoded: Sequence[Sequence[int]],
        max_tokens: int,
        rules: Sequence[StopRule],
        sampling: Sampling | None,
        vocabulary: int,
        compute: Callable[[], list[Response]],
    ) -> list[Response]:
        """A response to each prompt's token ids; computed where a rule has no fingerprint."""
        prints = [_fingerprint(rule) for rule in rules]
        if self.store is None or not self._may_keep(prompts) or None in prints:
            return compute()
        facts = {
            "sequences": [list(map(int, ids)) for ids in encoded],
            "most tokens": max_tokens,
            "rules": prints,
            "sampling": None if sampling is None else asdict(sampling),
        }

        def fits(stored: Mapping[str, Tensor]) -> bool:
            return _are_responses(stored, len(encoded), max_tokens, vocabulary)

        return _responses(self._of("responses", facts, fits, lambda: _tensors(compute())))

    def tensor(
        self,
        what: str,
        facts: Mapping[str, Any],
        shape: tuple[int | None, ...],
        compute: Callable[[], Tensor],
        responses_to: Iterable[Prompt] = (),
    ) -> Tensor:
        """A tensor of floats of this shape, on the CPU where it was computed elsewhere.

        Args:
            what: it is, in words.
            facts: all that it depends on besides the identity, JSON-ready.
            shape: of it; None: any length.
            compute: makes it; what it returned is returned where nothing else is stored.
            responses_to: prompts, of whose responses it tells tokens.
        """
        if not self._may_keep(responses_to):
            return compute()

        def fits(stored: Mapping[str, Tensor]) -> bool:
            values = stored.get("values")
            if values is None or not values.is_floating_point() or values.dim() != len(shape):
                return False
            return all(want in (None, size) for size, want in zip(values.shape, shape, strict=True))

        return self._of(what, facts, fits, lambda: {"values": compute()})["values"]

    def _may_keep(self, prompts: Iterable[Prompt]) -> bool:
        return self.kept_of is None or self.kept_of.issuperset(prompts)

    def _of(
        self,
        what: str,
        facts: Mapping[str, Any],
        fits: Callable[[Mapping[str, Tensor]], bool],
        compute: Callable[[], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        if self.store is None:
            return compute()
        content = json.dumps({**self.identity, **facts, "what": what}, sort_keys=True)
        key = hashlib.sha256(content.encode()).hexdigest()
        damaged = False
        try:
            stored = self._stored(self.store, key, what, fits)
        except StorageLostError:
            raise
        except StudyError as error:
            stored, damaged = None, True
            self.notify(f"the original model's {what} are computed again: {error}")
        if stored is not None:
            return stored
        tensors = compute()
        try:
            about = {"what": what, **self.identity}
            if not self.store.save(key, about, tensors, replace=damaged):
                # Another process was first: all use what it computed.
                return self._stored(self.store, key, what, fits) or tensors
        except StorageLostError:
            raise
        except StudyError as error:
            self.notify(f"the original model's {what} are not shared with other workers: {error}")
        return tensors

    def _stored(
        self, store: Store, key: str, what: str, fits: Callable[[Mapping[str, Tensor]], bool]
    ) -> dict[str, Tensor] | None:
        stored = store.load(key)
        if stored is not None and not fits(stored):
            raise StudyError(f"reference-{key[:12]} does not hold the {what} asked for")
        return stored


def arithmetic(lm: LanguageModel, batch_size: int) -> dict[str, Any]:
    """What the last bits of a pass depend on, JSON-ready."""
    if lm.device.type == "cuda":
        unit = torch.cuda.get_device_name(lm.device)
    else:
        unit = f"{processor()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "batch size": batch_size,
        "ways to run": vars(lm.capabilities),
        "attention": getattr(lm.model.config, "_attn_implementation", None),
        "packed weights": lm.head.packed_weight is not None,
        "unit": unit,
        "threads": torch.get_num_threads() if lm.device.type == "cpu" else None,
        "processes": ranks.count(),
    }


def _fingerprint(rule: StopRule) -> str | None:
    """Of a rule and its class, which may cut responses elsewhere; None: it has none."""
    of = getattr(rule, "fingerprint", None)
    content = of() if callable(of) else None
    kind = f"{type(rule).__module__}.{type(rule).__qualname__}"
    return f"{kind} {content}" if isinstance(content, str) else None


def _tensors(responses: Sequence[Response]) -> dict[str, Tensor]:
    width = max((len(response.tokens) for response in responses), default=0)
    rows = [[*r.tokens, *[-1] * (width - len(r.tokens))] for r in responses]
    ends = [-1 if r.end_token is None else r.end_token for r in responses]
    return {
        "tokens": torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width),
        "end": torch.tensor(ends, dtype=torch.int64),
        "decided": torch.tensor([r.decided for r in responses], dtype=torch.bool),
    }


def _are_responses(stored: Mapping[str, Tensor], count: int, most: int, vocabulary: int) -> bool:
    """Whether tensors are so many responses of at most `most` tokens each."""
    if stored.keys() != {"tokens", "end", "decided"}:
        return False
    tokens, end, decided = stored["tokens"], stored["end"], stored["decided"]
    if (tokens.dtype, end.dtype, decided.dtype) != (torch.int64, torch.int64, torch.bool):
        return False
    if tokens.dim() != 2 or tokens.shape[0] != count or tokens.shape[1] > most:
        return False
    ids = torch.cat([tokens.flatten(), end.flatten()])
    inside = bool(((ids >= -1) & (ids < vocabulary)).all())
    return inside and end.shape == (count,) and decided.shape == (count,)


def _responses(stored: Mapping[str, Tensor]) -> list[Response]:
    columns = (stored[name].tolist() for name in ("tokens", "end", "decided"))
    return [
        Response([token for token in row if token >= 0], None if end < 0 else end, decided)
        for row, end, decided in zip(*columns, strict=True)
    ]
