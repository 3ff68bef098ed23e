"""Texts from files, each with the group that its figures are shown under. Knows no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heretic_kl.errors import PromptError
from heretic_kl.files import expanded
from heretic_kl.prompts import DatasetSpec
from heretic_kl.prompts.loading import FILE_FORMATS
from heretic_kl.prompts.tables import read_file, read_splits, table_rows

CATEGORY = "category"
"""Column of a table that groups its rows."""


@dataclass(frozen=True)
class Document:
    """A text that depends on no other: what errors are clustered by where there are several."""

    text: str
    group: str
    """A file's name, or a category."""


def load_documents(files: Sequence[str | Path], column: str | None = None) -> tuple[Document, ...]:
    """Read all files, in order.

    A .jsonl, .json, .csv or .parquet file is a table with a document a row, grouped by its column
    `category` if it has one. Any other file is one document. A file's group is its name, a
    category's is its own, also across files.

    Args:
        files: paths.
        column: of the tables' texts; None: `text`, or the only column of strings.

    Raises:
        PromptError: a file is missing, unreadable, not UTF-8 or holds no text; in one line.
    """
    documents = [document for path in files for document in _read(Path(path), column)]
    names = [expanded(path).resolve() for path in files]
    if len(set(names)) < len(names):
        raise PromptError("a text file is named twice: its errors would look too small")
    return tuple(documents)


def _read(path: Path, column: str | None) -> list[Document]:
    path = expanded(path)
    if not path.is_file():
        raise PromptError(f"{path}: no such text file, or no regular one")
    kind = FILE_FORMATS.get(path.suffix.lower(), "text")
    rows = [(_whole(path), path.name)] if kind == "text" else _table(path, kind, column)
    documents = [Document(text, group) for text, group in rows if text.strip()]
    if not documents:
        raise PromptError(f"{path}: holds no text")
    return documents


def _whole(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PromptError(f"{path}: not UTF-8 text") from None


def _table(path: Path, kind: str, column: str | None) -> list[tuple[str, str]]:
    table = read_splits(DatasetSpec(str(path)), lambda: read_file(path, kind))
    has_categories = CATEGORY in table["train"].column_names
    if column is None and has_categories and "text" not in table["train"].column_names:
        raise PromptError(f"{path}: name the column of the texts with --text-column")
    texts = table_rows(DatasetSpec(str(path), column=column), lambda: table)
    groups: Sequence[str | None] = [path.name] * len(texts)
    if has_categories:
        groups = table_rows(DatasetSpec(str(path), column=CATEGORY), lambda: table)
    return [(text or "", group or path.name) for text, group in zip(texts, groups, strict=True)]
