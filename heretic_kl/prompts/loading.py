"""Prompts from the hub, folders, files and the built-in sets. Knows no settings and no tokenizer.

`datasets` is imported only when a source needs it: built-in sets and .txt files do not.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from heretic_kl.errors import PromptError
from heretic_kl.prompts.hub import (
    HUB_TIMEOUT_SECONDS,
    hub_problem,
    hub_reachable,
    innermost,
    is_cached,
    nearest_file,
    offline,
    quiet_datasets,
)
from heretic_kl.prompts.source import DatasetSpec

Kind = Literal["harmful", "harmless"]
Use = Literal["train", "validation", "test"]
KINDS: tuple[Kind, ...] = ("harmful", "harmless")
USES: tuple[Use, ...] = ("train", "validation", "test")
"""Train finds the directions, validation measures every trial, test the final trials, once."""
FILE_KINDS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_builtin_folder = files("heretic_kl") / "prompts" / "builtin"


@dataclass(frozen=True)
class Prompt:
    """What is said to the model, before any chat template."""

    user: str
    system: str | None = None


@dataclass(frozen=True)
class ResolvedPrompts:
    """Where every prompt comes from, and what the user should know about that."""

    specs: Mapping[tuple[Kind, Use], DatasetSpec]
    """By kind and use; the three uses of a kind are meant to be disjoint."""
    prompt_set: Literal["hub", "builtin"]  # what filled the tables that name no source
    notice: str | None = None


# --- which prompts --------------------------------------------------------------------------

_HUB_NAMES: dict[Kind, str] = {"harmful": "harmful_behaviors", "harmless": "harmless_alpaca"}
_HUB_PARTS: dict[Use, str] = {"train": "train[:400]", "validation": "test[:100]"}
HUB_SPECS: dict[tuple[Kind, Use], DatasetSpec] = {
    (kind, use): DatasetSpec(f"mlabonne/{name}", split, "text")
    for kind, name in _HUB_NAMES.items()
    for use, split in _HUB_PARTS.items()
}
BUILTIN_SPECS: dict[tuple[Kind, Use], DatasetSpec] = {
    (kind, use): DatasetSpec(f"builtin:{kind}", use) for kind in KINDS for use in USES
}


def resolve_specs(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    prompt_set: Literal["auto", "hub", "builtin"] = "auto",
    *,
    reachable: Callable[[Sequence[str]], bool] | None = None,
) -> ResolvedPrompts:
    """The spec of every kind and use, from the prompt tables of a configuration.

    Args:
        tables: kind (harmful, harmless) -> use (train, validation, test) -> the fields of a
            `DatasetSpec`, None where unset; a missing table or field is unset.
        prompt_set: What fills the tables that name no source. The test prompts come from the
            built-in set in either case. "auto" is the hub where it can be reached.
        reachable: Whether these hub datasets can be loaded; `hub_reachable` by default.
    """
    table: dict[tuple[Kind, Use], dict[str, Any]] = {
        key: dict(tables.get(key[0], {}).get(key[1], {})) for key in BUILTIN_SPECS
    }
    wanted = [spec for key, spec in HUB_SPECS.items() if not table[key].get("source")]
    notice = None
    chosen: Literal["hub", "builtin"] = "builtin" if prompt_set == "builtin" else "hub"
    if prompt_set == "auto" and wanted:
        names = sorted({spec.source for spec in wanted})
        if not (reachable or hub_reachable)(names):
            chosen = "builtin"
            notice = (
                f"{' and '.join(names)} cannot be reached on the hub: using the built-in prompts "
                "(--prompt-set builtin does so without asking the hub)"
            )
    defaults = {**BUILTIN_SPECS, **(HUB_SPECS if chosen == "hub" else {})}
    specs = {key: _spec(defaults[key], table[key], key[1]) for key in table}
    return ResolvedPrompts(specs, chosen, notice)


def _spec(default: DatasetSpec, fields: Mapping[str, Any], use: str) -> DatasetSpec:
    given = {name: value for name, value in fields.items() if value is not None}
    if not given.get("source"):
        return replace(default, **given)
    if str(given["source"]).startswith("builtin:"):
        given.setdefault("split", use)
    return DatasetSpec(**given)


# --- loading --------------------------------------------------------------------------------


def load_prompts(spec: DatasetSpec) -> list[Prompt]:
    """Load the prompts of `spec`, in order; rows without text are left out.

    Raises:
        PromptError: With one line: what is missing or unreadable, and what there is instead.
    """
    rows = _rows(spec)
    prompts = [
        Prompt(f"{spec.prefix}{text}{spec.suffix}", spec.system)
        for text in rows
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
    if spec.source.startswith("builtin:"):
        return _builtin_rows(spec)
    path = Path(spec.source).expanduser()
    if path.is_dir():
        return _table_rows(spec, lambda: _read_folder(path))
    if path.exists():
        kind = FILE_KINDS.get(path.suffix.lower())
        if kind is None:
            known = ", ".join(FILE_KINDS)
            raise PromptError(f"{spec.source}: not a kind of file that can be read ({known})")
        if kind == "text":
            return _text_rows(spec, path)
        return _table_rows(spec, lambda: _read_file(path, kind))
    if _looks_like_a_path(spec.source):
        raise PromptError(f"{spec.source}: no such file or folder{nearest_file(path)}")
    return _table_rows(spec, lambda: _read_hub(spec.source))


def _builtin_rows(spec: DatasetSpec) -> list[str | None]:
    name = spec.source.partition(":")[2]
    if name not in KINDS:
        known = " and ".join(f"builtin:{known}" for known in KINDS)
        raise PromptError(f"{spec.source}: unknown built-in set; there are {known}")
    if spec.column not in (None, "text"):
        raise PromptError(f"{spec.source}: no column {spec.column!r}; there is: text")
    rows: dict[str, list[str | None]] = {use: [] for use in USES}
    text = (_builtin_folder / f"{name}.jsonl").read_text(encoding="utf-8")
    for line in text.splitlines():
        row = json.loads(line)
        rows[row["use"]].append(row["text"])
    split, part = _split(spec, USES)
    return rows[split][part.of(len(rows[split]))]


def _text_rows(spec: DatasetSpec, path: Path) -> list[str | None]:
    if spec.column not in (None, "text"):
        raise PromptError(f"{spec.source}: no column {spec.column!r}; there is: text")
    _, part = _split(spec, ("train",))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PromptError(f"{spec.source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PromptError(f"{spec.source}: not UTF-8 text") from None
    lines: list[str | None] = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[part.of(len(lines))]


# --- splits and slices ----------------------------------------------------------------------

_BOUND = r"(?:(-?\d+)(%?))?"
_SPLIT = re.compile(rf"([\w.-]*)(?:\[{_BOUND}:{_BOUND}\])?")


@dataclass(frozen=True)
class _Bound:
    number: int
    percent: bool

    def of(self, rows: int) -> int:
        # Rounded as `datasets` rounds: to the closest row.
        return round(self.number * rows / 100) if self.percent else self.number


@dataclass(frozen=True)
class _Part:
    start: _Bound | None
    stop: _Bound | None

    def of(self, rows: int) -> slice:
        start = 0 if self.start is None else self.start.of(rows)
        stop = rows if self.stop is None else self.stop.of(rows)
        return slice(start, stop)


def _split(spec: DatasetSpec, names: Sequence[str]) -> tuple[str, _Part]:
    """Return the split's name, which must be one of `names`, and the slice of it."""
    match = _SPLIT.fullmatch(re.sub(r"\s", "", spec.split or ""))
    if match is None:
        raise PromptError(
            f"{spec.source}: cannot read split {spec.split!r}; written like train, train[:400], "
            "test[10:50], train[-20%:] or [:20]"
        )
    name, start, start_percent, stop, stop_percent = match.groups()
    known = ", ".join(names)
    if not name:
        if len(names) != 1:
            raise PromptError(f"{spec.source}: has several splits; name one with split: {known}")
        name = names[0]
    if name not in names:
        raise PromptError(f"{spec.source}: no split {name!r}; there is: {known}")
    return name, _Part(
        None if start is None else _Bound(int(start), bool(start_percent)),
        None if stop is None else _Bound(int(stop), bool(stop_percent)),
    )


# --- tables, read by `datasets` -------------------------------------------------------------


def _table_rows(spec: DatasetSpec, read: Callable[[], Mapping[str, Any]]) -> list[str | None]:
    """Read the splits, choose split, rows and column, and return the column's texts."""
    with quiet_datasets():
        try:
            splits = read()
        except PromptError:
            raise
        except Exception as error:
            # `datasets` raises errors of many libraries; the innermost one says what is wrong.
            reason = innermost(error)
            if "corresponds to no data" in reason:  # a header and no rows
                raise PromptError(f"{spec.describe()}: holds no prompts") from None
            raise PromptError(f"{spec.source}: cannot be read: {reason}") from error
        split, part = _split(spec, tuple(map(str, splits)))
        table = splits[split]
        column = _column(spec, table)
        rows = range(len(table))[part.of(len(table))]
        return [] if not rows else list(table.select(rows)[column])


def _column(spec: DatasetSpec, table: Any) -> str:
    """Return the named column, else `text`, else the only one of strings."""
    strings: list[str] = [
        name
        for name, feature in table.features.items()
        if getattr(feature, "dtype", None) in ("string", "large_string")
    ]
    listed = ", ".join(table.column_names) or "none"
    if spec.column is not None:
        if spec.column not in table.column_names:
            raise PromptError(f"{spec.source}: no column {spec.column!r}; there is: {listed}")
        if spec.column not in strings:
            raise PromptError(f"{spec.source}: column {spec.column!r} holds no text")
        return spec.column
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return strings[0]
    if len(table) == 0:
        raise PromptError(f"{spec.describe()}: holds no prompts")
    raise PromptError(f"{spec.source}: name the column of the prompts with column: {listed}")


def _read_file(path: Path, kind: str) -> Mapping[str, Any]:
    if path.stat().st_size == 0 or (kind != "parquet" and not path.read_bytes().strip()):
        raise PromptError(f"{path}: holds no prompts")
    import datasets

    # A cache of its own: nothing stale is read, nothing is left behind in the user's.
    with tempfile.TemporaryDirectory(prefix="heretic-kl-", ignore_cleanup_errors=True) as cache:
        table = datasets.load_dataset(
            kind, data_files=_literal(path), cache_dir=cache, split="train", keep_in_memory=True
        )
        return {"train": table}


def _literal(path: Path) -> str:
    """Escape what `datasets` would read as a pattern in a file's name."""
    return re.sub(r"([*?\[])", r"[\1]", str(path.resolve()))


def _read_folder(path: Path) -> Mapping[str, Any]:
    import datasets

    if (path / "dataset_dict.json").is_file():
        return _checked_splits(datasets.load_from_disk(str(path)))
    if (path / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(path), keep_in_memory=True)}
    with tempfile.TemporaryDirectory(prefix="heretic-kl-", ignore_cleanup_errors=True) as cache:
        return _checked_splits(
            datasets.load_dataset(str(path.resolve()), cache_dir=cache, keep_in_memory=True)
        )


def _read_hub(name: str) -> Mapping[str, Any]:
    cached = is_cached(name)
    problem = hub_problem([name], HUB_TIMEOUT_SECONDS)
    if problem is not None and not cached:
        raise PromptError(f"{name}: {problem}")
    import datasets

    with ExitStack() as stack:
        if problem is not None:
            # Cached, and the hub does not answer: `datasets` would retry for half a minute.
            stack.enter_context(offline())
        return _checked_splits(datasets.load_dataset(name))


def _checked_splits(found: Any) -> Mapping[str, Any]:
    assert isinstance(found, Mapping), type(found)
    return found


# --- files that are not there ---------------------------------------------------------------


def _looks_like_a_path(source: str) -> bool:
    return (
        Path(source).suffix.lower() in FILE_KINDS
        or source.startswith((".", "~", "/"))
        or "\\" in source
        or os.path.isabs(source)
        or source.count("/") > 1
    )
