"""What can be known to be wrong with models before the first one is loaded. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import Unpack

from heretic_kl.kl import Reference, vocabulary_hash
from heretic_kl.model import ModelSource, load_tokenizer
from heretic_kl.score.loader import Loading, ModelLoader, as_source, has_tokenizer
from heretic_kl.score.served import is_served


def check_models(
    reference: str | Path | Reference | None,
    candidates: Sequence[str | Path],
    **loading: Unpack[Loading],
) -> None:
    """Refuse models that could not be measured, while that still costs seconds.

    Args:
        reference: a model, or a stored reference; None: it has no tokenizer, so that the
            candidates must have one among themselves.
        candidates: models by name; adapters count.
        loading: see `Loading`.

    Raises:
        ModelError: one of them is not there or cannot be read.
        MeasurementError: a candidate has another tokenizer.
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
        expected = _hash(source if has_tokenizer(source) or put_on is None else put_on, loader)
    for name in candidates:
        if is_served(name):
            loader.served(str(name)).parent()  # which finds out whether it is there
            continue
        source = as_source(name)
        assert source is not None
        put_on = loader.base_of(source)
        loader.check(source, put_on)
        if loader.in_llama(source):  # which has a tokenizer of its own, checked once it is loaded
            continue
        loader.in_vllm(source)  # which finds out whether it is installed
        if not has_tokenizer(source):
            continue
        if expected is None:
            expected = _hash(source, loader)
        else:
            loader.require_tokenizer(source, expected)


def tokenizer_of(
    name: str | Path, tokenizer_hash: str, trust_remote_code: bool = False
) -> Any | None:
    """The tokenizer that lies beside a model; None: there is none, or another one."""
    source = as_source(name)
    if source is None or is_served(name) or not has_tokenizer(source):
        return None
    tokenizer: Any = load_tokenizer(source, trust_remote_code)
    return tokenizer if vocabulary_hash(tokenizer.get_vocab()) == tokenizer_hash else None


def _hash(source: ModelSource, loader: ModelLoader) -> str:
    tokenizer: Any = load_tokenizer(source, loader.trust_remote_code)
    return vocabulary_hash(tokenizer.get_vocab())
