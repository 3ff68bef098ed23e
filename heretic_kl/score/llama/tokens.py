"""Whether a GGUF file and a tokenizer mean the same by a token id. Runs no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from heretic_kl.errors import MeasurementError
from heretic_kl.kl import vocabulary_hash
from heretic_kl.score.llama.model import LlamaModel

MOST_CHARACTERS = 4000
"""Of a text that is split by both."""


def check_vocabulary(model: LlamaModel, tokenizer: Any) -> None:
    """Compare the text of every token id that the tokenizer has.

    Raises:
        MeasurementError: the file has fewer tokens, or another one at some id.
    """
    size = len(tokenizer)
    if size > model.vocabulary:
        raise MeasurementError(
            f"{model.name!r} cannot be compared with the reference: it has {model.vocabulary} "
            f"tokens, the reference's tokenizer {size}"
        )
    ours = tokenizer.convert_ids_to_tokens(list(range(size)))
    theirs = [token_text(model, index) for index in range(size)]
    _require_same(model, ours, theirs)


def check_same_tokens(reference: LlamaModel, candidate: LlamaModel) -> None:
    """Compare the text of every token id of two files.

    Raises:
        MeasurementError: they have another number of tokens, or other ones.
    """
    if reference.vocabulary != candidate.vocabulary:
        raise MeasurementError(
            f"{candidate.name!r} cannot be compared with the reference: it has "
            f"{candidate.vocabulary} tokens, the reference {reference.vocabulary}"
        )
    ours, theirs = (
        [token_text(model, index) for index in range(model.vocabulary)]
        for model in (reference, candidate)
    )
    _require_same(candidate, ours, theirs)


def _require_same(candidate: LlamaModel, ours: Sequence[str | None], theirs: Sequence[str]) -> None:
    pairs = enumerate(zip(ours, theirs, strict=True))
    other = [index for index, (text, stored) in pairs if text is not None and text != stored]
    if other:
        index = other[0]
        raise MeasurementError(
            f"{candidate.name!r} cannot be compared with the reference: {len(other)} tokens "
            f"differ, the first is {index} (reference {ours[index]!r}, candidate "
            f"{theirs[index]!r})"
        )


def check_hash(model: LlamaModel, expected: str) -> None:
    """The same where only the hash of the tokenizer's vocabulary is there.

    Raises:
        MeasurementError: the file's vocabulary has another hash.
    """
    texts = [token_text(model, index) for index in range(model.vocabulary)]
    while texts and texts[-1] == f"[PAD{len(texts) - 1}]":  # a head wider than the tokenizer
        texts.pop()
    own_hash = vocabulary_hash({text: index for index, text in enumerate(texts)})
    if own_hash != expected:
        raise MeasurementError(
            f"{model.name!r} cannot be compared with the reference: another tokenizer "
            f"(reference {expected[:12]!r}, candidate {own_hash[:12]!r})"
        )


def check_round_trip(name: str, tokenizer: Any, windows: Sequence[Sequence[int]]) -> None:
    """Check that token ids of a text are a tokenizer's own: their text must give them again.

    Args:
        name: of what holds the ids, for the message.
        tokenizer: whose ids they should be.
        windows: token ids, cut anywhere.

    Raises:
        MeasurementError: fewer than nine in ten come again, in any order, so that where windows
            are cut makes no difference.
    """
    stored: Counter[int] = Counter()
    again: Counter[int] = Counter()
    for ids in windows:
        stored.update(ids)
        text = tokenizer.decode(list(ids), skip_special_tokens=False)
        again.update(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    common = (stored & again).total()
    if common < 0.9 * stored.total():
        raise MeasurementError(
            f"{name} holds token ids of another tokenizer: of {stored.total()} ids {common} come "
            "again when their text is split by the candidate's"
        )


def texts_split_otherwise(
    model: LlamaModel, tokenizer: Any, sequences: Sequence[Sequence[int]]
) -> int:
    """Of how many sequences the text becomes other tokens in llama.cpp than in the tokenizer."""
    count = 0
    for ids in sequences:
        text = tokenizer.decode(list(ids), skip_special_tokens=False)[:MOST_CHARACTERS]
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        count += ours != tokenize(model, text)
    return count


def tokenize(model: LlamaModel, text: str) -> list[int]:
    """llama.cpp's tokens of a text, nothing put before it."""
    data = text.encode()
    room = len(data) + 16
    tokens = (model.library.llama_token * room)()
    count = model.library.llama_tokenize(
        model.vocabulary_pointer, data, len(data), tokens, room, False, True
    )
    return list(tokens[: max(0, count)])


def token_text(model: LlamaModel, index: int) -> str:
    """As the file has it."""
    text: bytes = model.library.llama_vocab_get_text(model.vocabulary_pointer, index)
    return text.decode(errors="replace")
