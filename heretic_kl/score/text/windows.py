"""Documents as windows of tokens, the end of each scored. Knows no model and reads no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from heretic_kl.engine.teacher_forcing.batches import ForcedSequence
from heretic_kl.errors import MeasurementError
from heretic_kl.score.text.documents import Document


class Window(NamedTuple):
    """Consecutive tokens of one document; the last of them are scored."""

    sequence: ForcedSequence
    document: int


def cut_documents(
    documents: Sequence[Document], tokenizer: Any, *, context: int, stride: int
) -> tuple[Window, ...]:
    """Cut all documents; every scored token has at least `context - stride` before it.

    Windows of a document begin `stride` tokens apart, so that each token past the first
    `context - stride` is scored once, up to the last whole window. A document that is shorter than
    `context` is one window, of which the same share is scored. Where the tokenizer puts a token
    before every text, each window begins with it, in place of its first token.

    Raises:
        MeasurementError: no document has two tokens.
    """
    first = first_token(tokenizer)
    windows = [
        Window(sequence, index)
        for index, document in enumerate(documents)
        for sequence in _windows(token_ids(tokenizer, document.text), first, context, stride)
    ]
    if not windows:
        raise MeasurementError("the text is too short to be measured: no document has two tokens")
    return tuple(windows)


def cut_as_llama(document: Document, tokenizer: Any, context: int) -> list[list[int]]:
    """Whole windows one after the other, token ids as llama.cpp's file of base logits has them.

    Raises:
        MeasurementError: there is not one.
    """
    first = first_token(tokenizer)
    ids = [*([] if first is None else [first]), *token_ids(tokenizer, document.text)]
    windows = [ids[at : at + context] for at in range(0, len(ids) - context + 1, context)]
    if not windows:
        raise MeasurementError(f"the text has {len(ids)} tokens, fewer than a window of {context}")
    return windows


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The text alone, nothing put before or after it; text of any length, without a warning."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def first_token(tokenizer: Any) -> int | None:
    """What the tokenizer puts before every text; None: nothing."""
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a")["input_ids"]
    return bos if bos is not None and ids[:1] == [bos] else None


def _windows(
    ids: Sequence[int], first: int | None, context: int, stride: int
) -> Iterator[ForcedSequence]:
    scored = stride
    if len(ids) < context:
        scored = min(len(ids) - 1, max(1, round(len(ids) * stride / context)))
        context = stride = len(ids)
    if scored < 1:
        return
    for start in range(0, len(ids) - context + 1, stride):
        window = [*ids[start : start + context]]
        if first is not None:
            window[0] = first
        yield ForcedSequence(tuple(window[:-scored]), tuple(window[-scored:]))
