"""Loads the prompts of a spec: built-in sets, files of lines, and whatever `datasets` reads.

Knows no settings and no tokenizer.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from heretic_kl.errors import PromptError
from heretic_kl.files import expanded
from heretic_kl.prompts.hub import nearest_file
from heretic_kl.prompts.source import DatasetSpec
from heretic_kl.prompts.specs import KINDS, USES
from heretic_kl.prompts.splits import read_split
from heretic_kl.prompts.tables import read_file, read_folder, read_hub, table_rows

FILE_FORMATS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
PANEL = "builtin:panel"
"""Test prompts of six categories in three scripts, for measurements that are compared."""
PANEL_VERSION = 1
"""Goes up with any change of a prompt, and the new panel gets another name."""
_builtin_folder = files("heretic_kl") / "prompts" / "builtin"


@dataclass(frozen=True)
class Prompt:
    """What is said to the model, before any chat template."""

    user: str
    system: str | None = None
    category: str | None = field(default=None, compare=False)
    """Of which its figures are shown apart; None: no category."""


def load_prompts(spec: DatasetSpec) -> list[Prompt]:
    """Load the prompts of `spec`, in order; rows without text are left out.

    Raises:
        PromptError: With one line: what is missing or unreadable, and what there is instead.
    """
    if spec.more:
        return [prompt for part in spec.parts() for prompt in load_prompts(part)]
    try:
        rows = _rows(spec)
    except OSError as error:  # of a name that is too long, or a folder that may not be read
        raise PromptError(f"{spec.source}: cannot be read: {error.strerror}") from error
    categories = _panel_categories(rows) if spec.source == PANEL else [None] * len(rows)
    prompts = [
        Prompt(f"{spec.prefix}{text}{spec.suffix}", spec.system, category)
        for text, category in zip(rows, categories, strict=True)
        if text is not None and text.strip()
    ][: spec.limit]
    if not prompts:
        raise PromptError(f"{spec.describe()}: holds no prompts")
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 of the prompts, in order, as hex."""
    content = json.dumps([[prompt.user, prompt.system] for prompt in prompts])
    return hashlib.sha256(content.encode("ascii")).hexdigest()


def _rows(spec: DatasetSpec) -> Sequence[str | None]:
    """Return the texts of the source's split and slice."""
    path = expanded(spec.source)
    builtin = spec.source.startswith("builtin:")
    kind = "a built-in set" if builtin else "a folder" if path.is_dir() else "a file"
    if spec.subset is not None and (builtin or path.is_file()):
        raise PromptError(f"{spec.source}: no subset {spec.subset!r}: it is {kind}")
    if spec.revision is not None and (builtin or path.exists()):
        raise PromptError(f"{spec.source}: no revision {spec.revision!r}: it is {kind}")
    if builtin:
        return _builtin_rows(spec)
    if path.is_dir():
        return table_rows(spec, lambda: read_folder(path, spec.subset))
    if path.exists():
        if not path.is_file():  # a pipe or a device might never end
            raise PromptError(f"{spec.source}: not a regular file: copy its content to one")
        file_format = FILE_FORMATS.get(path.suffix.lower())
        if file_format is None:
            listed = ", ".join(FILE_FORMATS)
            raise PromptError(f"{spec.source}: not a kind of file that can be read ({listed})")
        if file_format == "text":
            return _text_rows(spec, path)
        return table_rows(spec, lambda: read_file(path, file_format))
    if path.is_symlink():
        raise PromptError(f"{spec.source}: a link that leads nowhere")
    if _looks_like_a_path(spec.source):
        raise PromptError(f"{spec.source}: no such file or folder{nearest_file(path)}")
    return table_rows(spec, lambda: read_hub(spec.source, spec.subset, spec.revision))


def _builtin_rows(spec: DatasetSpec) -> list[str | None]:
    name = spec.source.partition(":")[2]
    if name not in KINDS and spec.source != PANEL:
        listed = ", ".join([*(f"builtin:{kind}" for kind in KINDS), PANEL])
        raise PromptError(f"{spec.source}: unknown built-in set; there are {listed}")
    if spec.column not in (None, "text"):
        raise PromptError(f"{spec.source}: no column {spec.column!r}; there is: text")
    rows: dict[str, list[str | None]] = {use: [] for use in USES}
    for row in _stored_rows(name):
        rows[row["use"]].append(row["text"])
    split, part = read_split(spec, USES)
    return rows[split][part.of(len(rows[split]))]


def _stored_rows(name: str) -> list[dict[str, str]]:
    text = (_builtin_folder / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _panel_categories(texts: Sequence[str | None]) -> list[str | None]:
    by_text = {row["text"]: row["category"] for row in _stored_rows("panel")}
    return [by_text[text or ""] for text in texts]


def _text_rows(spec: DatasetSpec, path: Path) -> list[str | None]:
    if spec.column not in (None, "text"):
        raise PromptError(f"{spec.source}: no column {spec.column!r}; there is: text")
    _, part = read_split(spec, ("train",))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"{spec.source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PromptError(f"{spec.source}: not UTF-8 text") from None
    lines: list[str | None] = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[part.of(len(lines))]


def _looks_like_a_path(source: str) -> bool:
    return (
        Path(source).suffix.lower() in FILE_FORMATS
        or source.startswith((".", "~", "/"))
        or "\\" in source
        or os.path.isabs(source)
        or source.count("/") > 1
    )
