"""Tables of prompts in files, folders and on the hub, read by `datasets`, quietly.

`datasets` is imported only when a table is read.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from heretic_kl.errors import PromptError, innermost, plain_line
from heretic_kl.files import link_out
from heretic_kl.prompts.hub import (
    COMMIT,
    HUB_TIMEOUT_SECONDS,
    commit_of,
    commits,
    hub_problem,
    is_cached,
    offline,
    prepared,
    quiet_datasets,
)
from heretic_kl.prompts.source import DatasetSpec
from heretic_kl.prompts.splits import read_split

ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar"}

MOST_ROWS = 10_000_000
MOST_BYTES = 2**30
"""Of a parquet file, uncompressed."""


def table_rows(spec: DatasetSpec, read: Callable[[], Mapping[str, Any]]) -> list[str | None]:
    """Read the splits, choose split, rows and column, and return the column's texts.

    Raises:
        PromptError: it cannot be read, or has no such split or column.
    """
    splits = read_splits(spec, read)
    with quiet_datasets():
        split, part = read_split(spec, tuple(map(str, splits)))
        table = splits[split]
        column = _column(spec, table)
        rows = range(len(table))[part.of(len(table))]
        return [] if not rows else list(table.select(rows)[column])


def read_splits(spec: DatasetSpec, read: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return what `read` returns, whose errors become a `PromptError` of one line."""
    with quiet_datasets():
        try:
            return read()
        except PromptError:
            raise
        except Exception as error:
            # `datasets` raises errors of many libraries; the innermost one says what is wrong.
            reason = innermost(error)
            if re.search(r"No \(supported\) data files|resolve pattern", reason):
                reason = "it holds no .txt, .jsonl, .json, .csv or .parquet file"
            if "corresponds to no data" in reason:  # a header and no rows
                raise PromptError(f"{spec.describe()}: holds no prompts") from None
            raise PromptError(f"{spec.source}: cannot be read: {reason}") from error


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


def read_file(path: Path, file_format: str) -> Mapping[str, Any]:
    """Return the only split of a file, in a format that `datasets` names."""
    if path.stat().st_size == 0 or (file_format != "parquet" and not path.read_bytes().strip()):
        raise PromptError(f"{path}: holds no prompts")
    _check_expansion(path)
    import datasets

    # A cache of its own: nothing stale is read, nothing is left behind in the user's.
    with tempfile.TemporaryDirectory(prefix="heretic-kl-", ignore_cleanup_errors=True) as cache:
        table = datasets.load_dataset(
            file_format,
            data_files=_literal(path),
            cache_dir=cache,
            split="train",
            keep_in_memory=True,
        )
        return {"train": table}


def _literal(path: Path) -> str:
    """Escape what `datasets` would read as a pattern in a file's name."""
    return re.sub(r"([*?\[])", r"[\1]", str(path.resolve()))


def read_folder(path: Path, subset: str | None = None) -> Mapping[str, Any]:
    """Return the splits of a saved dataset, or of a folder of files or of its subset."""
    packed = sorted(file.name for file in path.rglob("*") if file.suffix.lower() in ARCHIVES)
    if packed:  # `datasets` would unpack it, however large it becomes
        raise PromptError(f"{path}: holds the archive {packed[0]}: unpack it and move it away")
    if (link := link_out(path, everything=True)) is not None:
        raise PromptError(f"{path}: {link.name} is a link that leads out of the folder")
    saved = [name for name in ("dataset_dict.json", "state.json") if (path / name).is_file()]
    cards = [path / name for name in ("README.md", ".huggingface.yaml", *saved)]
    for card in [*cards, *(path.glob("*/**/state.json") if saved else ())]:
        for name in _stated_files(card):
            if re.search(r"://|::|(^|[/\\])\.\.([/\\]|$)|^[/\\~]", name):
                where = plain_line(f"{card.relative_to(path)} names data files elsewhere: {name}")
                raise PromptError(f"{path}: {where}")
    for file in path.rglob("*"):
        if file.is_file():
            _check_expansion(file)
    import datasets

    if saved and subset is not None:
        raise PromptError(f"{path}: no subset {subset!r}: it is one saved dataset")
    if (path / "dataset_dict.json").is_file():
        return _checked_splits(datasets.load_from_disk(str(path)))
    if (path / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(path), keep_in_memory=True)}
    with tempfile.TemporaryDirectory(prefix="heretic-kl-", ignore_cleanup_errors=True) as cache:
        return _checked_splits(
            datasets.load_dataset(str(path.resolve()), subset, cache_dir=cache, keep_in_memory=True)
        )


def _check_expansion(path: Path) -> None:
    """Refuse a file that would become much larger on reading than it is.

    Raises:
        PromptError: `datasets` would unpack it, or it says that it holds more than is read.
    """
    from datasets.utils.extract import Extractor
    from pyarrow.parquet import read_metadata

    if Extractor.infer_extractor_format(path):
        raise PromptError(f"{path}: its content is an archive or compressed: unpack it")
    if path.suffix.lower() == ".parquet":
        stated = read_metadata(path)
        groups = range(stated.num_row_groups)
        size = sum(abs(stated.row_group(place).total_byte_size) for place in groups)
        if stated.num_rows > MOST_ROWS or size > MOST_BYTES:
            raise PromptError(
                f"{path}: {stated.num_rows:,} rows, {size / 2**30:.1f} GB uncompressed: at most "
                f"{MOST_ROWS:,} rows and {MOST_BYTES / 2**30:.0f} GB of a file are read"
            )


def _stated_files(card: Path) -> Iterator[str]:
    """Every text where a card, or a saved dataset's JSON, names data files or patterns of them."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not card.is_file():
        return
    key = {"dataset_dict.json": "splits", "state.json": "_data_files"}.get(card.name, "configs")
    try:
        text = card.read_text(encoding="utf-8-sig", errors="replace")
        if card.name == "README.md":
            text = match[2] if (match := REGEX_YAML_BLOCK.search(text)) else ""
        if key == "configs" and any(map(_merges, yaml.parse(text, yaml.SafeLoader))):
            raise PromptError(f"{card}: it merges parts (<< in YAML): write them out")
        whole = yaml.safe_load(text) if key == "configs" else json.loads(text)
    except (OSError, ValueError, TypeError, yaml.YAMLError, RecursionError):
        what = "front matter" if card.name == "README.md" else "content"
        raise PromptError(f"{card}: its {what} cannot be read") from None
    stated: list[Any] = [whole.get(key)] if isinstance(whole, Mapping) else []
    seen: set[int] = set()
    while stated:
        value = stated.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping | list | tuple):
            if id(value) in seen:  # YAML can name a part many times over: `datasets` would hang
                raise PromptError(f"{card}: its front matter names one part twice (a YAML alias)")
            seen.add(id(value))
            stated += value.values() if isinstance(value, Mapping) else value


def _merges(event: Any) -> bool:
    """Whether an event of YAML is the key `<<`: merged parts can double without end on loading."""
    plain = getattr(event, "value", None) == "<<" and event.implicit[0]
    return plain or str(getattr(event, "tag", None)).endswith(":merge")


def read_hub(
    name: str, subset: str | None = None, revision: str | None = None
) -> Mapping[str, Any]:
    """Return the splits of a dataset of the hub at a revision, or of its cached copy.

    A commit that is cached needs no hub; what a tag or a branch is only the hub knows.
    """
    if revision is not None and (splits := _prepared_splits(name, subset, revision)) is not None:
        commits[name, revision] = revision
        return splits
    pinned = name if revision is None else f"{name}@{revision}"
    problem = hub_problem([pinned], HUB_TIMEOUT_SECONDS)
    if problem is not None and (revision is not None or not is_cached(name)):
        raise PromptError(f"{name}: {problem}")
    import datasets

    wanted = None if revision is None else commit_of(name, revision)
    with ExitStack() as stack:
        if problem is not None:
            # Cached, and the hub does not answer: `datasets` would retry for half a minute.
            stack.enter_context(offline())
        splits = _checked_splits(datasets.load_dataset(name, subset, revision=wanted))
    files = next(iter(splits.values())).cache_files
    commit = Path(files[0]["filename"]).parent.name if files else ""
    if re.fullmatch(COMMIT, commit):
        if wanted not in (None, commit):  # `datasets` takes any cached one where the hub fails
            raise PromptError(f"{name}: the hub did not give revision {revision!r}: try again")
        commits[name, revision] = commit
    return splits


def _prepared_splits(name: str, subset: str | None, commit: str) -> Mapping[str, Any] | None:
    """The cached copy of a commit; None: there is none, or `commit` is a tag or a branch."""
    if not re.fullmatch(COMMIT, commit):
        return None
    folders = {folder.parts[-3]: folder for folder in prepared(name, commit)}
    config = subset or (next(iter(folders)) if len(folders) == 1 else "default")
    if config not in folders:
        return None
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    cached = Cache(
        cache_dir=str(datasets.config.HF_DATASETS_CACHE),
        dataset_name=name.rpartition("/")[2],
        config_name=config,
        version=folders[config].parts[-2],
        hash=commit,
        repo_id=name,
    )
    return _checked_splits(cached.as_dataset())


def _checked_splits(loaded: Any) -> Mapping[str, Any]:
    assert isinstance(loaded, Mapping), type(loaded)
    return loaded
