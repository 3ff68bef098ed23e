"""What can be known to be wrong with models before the first one is loaded. Loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import Reference, vocabulary_hash
from heretic_kl.model import ModelSource, load_tokenizer
from heretic_kl.score.loader import Loading, ModelLoader, as_source, has_tokenizer
from heretic_kl.score.reference_side import HEAD_NEEDED
from heretic_kl.score.served import is_served
from heretic_kl.score.stored import require_memory


def check_models(
    reference: str | Path | Reference | None,
    candidates: Sequence[str | Path],
    *,
    head: bool = True,
    **loading: Unpack[Loading],
) -> None:
    """Refuse models that could not be measured, while that still costs seconds.

    Args:
        reference: a model, or a stored reference; None: it has no tokenizer, so that the
            candidates must have one among themselves.
        candidates: models by name; adapters count.
        head: the head of a stored reference is known, too.
        loading: see `Loading`.

    Raises:
        ModelError: one of them is not there or cannot be read.
        MeasurementError: a candidate has another tokenizer, or needs a head that is not known.
    """
    loader = ModelLoader(**loading)
    expected: str | None = None
    if isinstance(reference, Reference):
        expected = reference.identity.tokenizer_hash
    elif reference is not None:
        source = as_source(reference)
        assert source is not None
        put_on = loader.take_reference(source)
        loader.check(source, put_on)
        tokenizer = loader.tokenizer_of_reference(source, put_on)
        expected = vocabulary_hash(tokenizer.get_vocab())
    alone = isinstance(reference, Reference) and reference.logits is None and not head
    for name in candidates:
        if is_served(name):
            _require_head(alone)
            loader.served(str(name)).parent()  # which finds out whether it is there
            continue
        source = as_source(name)
        assert source is not None
        put_on = loader.base_of(source)
        loader.check(source, put_on)
        if loader.in_llama(source):  # which has a tokenizer of its own, checked once it is loaded
            _require_head(alone)
            continue
        if loader.in_vllm(source):  # which finds out whether it is installed
            _require_head(alone)
        if not has_tokenizer(source):
            continue
        if expected is None:
            expected = _hash(source, loader)
        else:
            loader.require_tokenizer(source, expected)


def check_logits_fit(
    reference: str | Path, positions: Callable[[Any], int], **loading: Unpack[Loading]
) -> None:
    """Refuse to store a reference's logits where memory may be too small, before it is loaded.

    Args:
        reference: a model by name.
        positions: told its tokenizer, says how many are scored at most.
        loading: see `Loading`.

    Raises:
        ModelError: it has no tokenizer.
        MeasurementError: memory may be too small.
    """
    loader = ModelLoader(**loading)
    source = as_source(reference)
    assert source is not None
    tokenizer = loader.tokenizer_of_reference(source, loader.take_reference(source))
    live = loader.backend == "llama.cpp" and source.gguf_file is not None
    require_memory(positions(tokenizer), len(tokenizer), has_hidden=not live, most="up to ")


def tokenizer_of(
    name: str | Path, tokenizer_hash: str, trust_remote_code: bool = False
) -> Any | None:
    """The tokenizer that lies beside a model; None: there is none, or another one."""
    source = as_source(name)
    if source is None or is_served(name) or not has_tokenizer(source):
        return None
    tokenizer: Any = load_tokenizer(source, trust_remote_code)
    return tokenizer if vocabulary_hash(tokenizer.get_vocab()) == tokenizer_hash else None


def _require_head(alone: bool) -> None:
    if alone:
        raise MeasurementError(HEAD_NEEDED)


def _hash(source: ModelSource, loader: ModelLoader) -> str:
    tokenizer: Any = load_tokenizer(source, loader.trust_remote_code)
    return vocabulary_hash(tokenizer.get_vocab())
