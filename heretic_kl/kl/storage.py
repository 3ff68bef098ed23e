"""Tensors and facts in one safetensors file, written whole or not at all.

And by what a stored reference is known again. Knows nothing about what the tensors mean.
safetensors is imported only when a file is touched.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from heretic_kl.errors import MeasurementError, plain_line
from heretic_kl.files import new_file
from heretic_kl.kl.terms import METRIC_VERSION

Setting = str | int | float | bool | None


def save_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]
) -> None:
    """Write `tensors` and the JSON-ready `facts` to `path`, replacing it in one step.

    A crash halfway leaves what was there before. `kind` tells `load_tensors` the files apart.
    """
    from safetensors.torch import save_file

    metadata = {
        "kind": kind,
        "metric_version": str(METRIC_VERSION),
        "facts": json.dumps(dict(facts), sort_keys=True),
    }
    with new_file(Path(path)) as partial:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata)


def load_tensors(
    path: str | Path, kind: str, group: str = ""
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors (on the CPU, memory-mapped where possible) and facts of a file.

    A tensor `GROUP.NAME` is read with its group alone, as `NAME`.

    Raises:
        MeasurementError: There is no such file, it is not of this `kind`, or another metric
            version wrote it.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise MeasurementError(f"there is no {kind} file at {source}")
    try:
        with safe_open(source, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            if metadata.get("kind") != kind:
                raise MeasurementError(
                    f"{source} is not a {kind} file, but {metadata.get('kind', 'something else')}"
                )
            version = metadata.get("metric_version")
            if version != str(METRIC_VERSION):
                raise MeasurementError(
                    f"{source} was written by metric version {version}, "
                    f"this is version {METRIC_VERSION}: compute it again"
                )
            tensors: dict[str, Tensor] = {}
            for name in opened.keys():
                of, _, short = name.rpartition(".")
                if of == group:
                    tensors[short] = opened.get_tensor(name)
            facts: dict[str, object] = json.loads(metadata["facts"])
            if not isinstance(facts, dict):
                raise ValueError("its facts are no table")
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise MeasurementError(f"{source} cannot be read: {error}") from error
    return tensors, facts


@contextmanager
def undamaged(path: str | Path) -> Iterator[None]:
    """Say in one line that parts of a file are missing, or do not fit together.

    Raises:
        MeasurementError: The block raised `KeyError`, `TypeError`, `ValueError`,
            `OverflowError` or `RecursionError`.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        shown = plain_line(" ".join(reason.split()))
        raise MeasurementError(f"{path} is damaged: {shown}; store it anew") from error


@dataclass(frozen=True)
class ReferenceIdentity:
    """What must agree for two measurements to have the same reference.

    Attributes:
        tokenizer_hash: See `vocabulary_hash`.
        vocabulary_size: Number of tokens that the logits cover.
        head_fingerprint: `Head.fingerprint()`; None where logits are stored.
        settings: Whatever else changes the reference: model, prompts' hash, number of tokens,
            greedy or sampled with which seed, dtype. JSON-ready scalars.
    """

    tokenizer_hash: str
    vocabulary_size: int
    head_fingerprint: str | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise `TypeError` or `ValueError` unless all of it is of the kind stated."""
        if not isinstance(self.tokenizer_hash, str) or not isinstance(
            self.head_fingerprint, str | None
        ):
            raise TypeError("tokenizer_hash and head_fingerprint must be text")
        if not isinstance(self.vocabulary_size, int) or not 1 <= self.vocabulary_size:
            raise ValueError(f"vocabulary_size must be 1 or more, got {self.vocabulary_size!r}")
        for name, value in dict(self.settings).items():
            if not isinstance(value, Setting):
                raise TypeError(f"setting {name} must be a scalar, got {value!r}")

    def require_match(
        self,
        expected: "ReferenceIdentity",
        *,
        problem: str = "the stored reference does not fit",
        sides: tuple[str, str] = ("stored", "now"),
        remedy: str = "compute it again",
    ) -> None:
        """Raise `MeasurementError`, naming every difference, unless this is as `expected`.

        The head is compared only where both are known: stored logits need none.

        Args:
            expected: What this must be.
            problem: What the message begins with.
            sides: What this and the expected one are called in it.
            remedy: What to do.
        """
        mine, theirs = sides
        pairs: list[tuple[str, Setting, Setting]] = [
            ("tokenizer", self.tokenizer_hash[:12], expected.tokenizer_hash[:12]),
            ("vocabulary", self.vocabulary_size, expected.vocabulary_size),
        ]
        if self.head_fingerprint is not None and expected.head_fingerprint is not None:
            pairs.append(("head", self.head_fingerprint[:12], expected.head_fingerprint[:12]))
        for name in sorted({*self.settings, *expected.settings}):
            pairs.append((f"setting {name}", self.settings.get(name), expected.settings.get(name)))
        differences = [
            f"another {what} ({mine} {ours!r}, {theirs} {other!r})"
            for what, ours, other in pairs
            if ours != other
        ]
        if differences:
            raise MeasurementError(f"{problem}: {', '.join(differences)}; {remedy}")


def vocabulary_hash(
    vocabulary: Mapping[str, int],  # token text -> id, special and added tokens included
) -> str:
    """Return a SHA-256 of a tokenizer's vocabulary, in any order of its entries."""
    entries = sorted((index, token) for token, index in vocabulary.items())
    # The empty dict keeps the hashes that stored references carry.
    text = json.dumps([entries, {}], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
