"""Attributes that are longer than a database holds in one: written in pieces, read as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import optuna

MOST_CHARACTERS = 60_000
"""Of an attribute as JSON: MySQL holds 65,535 bytes."""
PIECE_CHARACTERS = 30_000
"""Of a piece, which Optuna writes as JSON once more; quotes and backslashes double."""
PIECES = "heretic-kl:pieces"
"""Key of what stands for an attribute in pieces -> their names, in order."""


def in_pieces(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-ready attributes as they are written, in this order; short ones stay as they are.

    Pieces are named by what they hold, and come before what names them: whoever reads meanwhile
    reads an attribute whole, as it was or as it is now.
    """
    written: dict[str, Any] = {}
    for name, value in attributes.items():
        text = json.dumps(value)
        if len(text) > MOST_CHARACTERS:
            prefix = f"{PIECES}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
            starts = range(0, len(text), PIECE_CHARACTERS)
            pieces = {f"{prefix}:{at}": text[at : at + PIECE_CHARACTERS] for at in starts}
            written |= pieces
            value = {PIECES: list(pieces)}
        written[name] = value
    return written


def whole(attributes: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value of an attribute, as it was before it was cut.

    Raises:
        KeyError: a piece is missing.
        ValueError: pieces are not what was written.
    """
    value = attributes.get(name, default)
    if isinstance(value, dict) and PIECES in value:
        return json.loads("".join(attributes[piece] for piece in dict.fromkeys(value[PIECES])))
    return value


def keep(study: optuna.Study, name: str, value: Any) -> None:
    """Write an attribute of a study, however long."""
    for part, written in in_pieces({name: value}).items():
        study.set_user_attr(part, written)
