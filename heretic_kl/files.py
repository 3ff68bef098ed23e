"""Files and folders that appear whole or not at all, hashes, the cache folder. Knows no contents.

A new file or folder is written under a hidden name beside its target, `.NAME.partial-TOKEN`, is
flushed to the disk and then renamed. What it replaces is moved to `.NAME.old-TOKEN` first and
removed last. Both are locked while their process lives, so that the next write to the same
target can tell and remove what a killed process left.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Final

CACHE_VARIABLE: Final = "HERETIC_KL_CACHE"
LONGEST_NAME: Final = 200  # bytes; file systems take 255, suffixes included
_BLOCK_BYTES: Final = 1 << 20
_REPOSITORY: Final = re.compile("(models|datasets)--")
_BLOB: Final = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
"""Folders of repositories, and files, in the hub's cache."""
TOKENS: Final = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_)[A-Za-z0-9_-]{8,}")
"""Tokens of the hub, of endpoints and of GitHub."""
_SECRETS: Final = (
    # The password of a URL, which ends before the next value of JSON or cell of HTML.
    (re.compile(r"(://[^\s:/@]*):(?:(?!\"[],}]|<)[^\s@])*@"), r"\1:***@"),
    (TOKENS, "***"),
    (re.compile(r"((?:password|token|api_key|secret)=)[^\s&'\"]+", re.IGNORECASE), r"\1***"),
)


def expanded(path: Path | str) -> Path:
    """Return a path, `~` at its beginning replaced; of an unknown user it stays as it is."""
    return Path(os.path.expanduser(path))


def without_home(text: str) -> str:
    """Return a text, JSON and HTML too, with paths in this user's home folder as `~/...`."""
    home = os.path.expanduser("~")
    if home.strip("/\\.~") == "":
        return text
    for folder in {home, json.dumps(home)[1:-1]}:
        text = re.sub(rf"(?<![^\s\"'`=:;,(\[>]){re.escape(folder)}(?=[/\\])", "~", text)
        text = text.replace(f":///{folder}/", ":///~/")
    return text


def without_secrets(text: str) -> str:
    """Return a text without passwords of URLs and without tokens."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def redacted(text: str) -> str:
    """Return a text as it may go into a file: without secrets, and `~` in place of the home."""
    return without_home(without_secrets(text))


def is_file_name(name: str) -> bool:
    """Whether a name stays inside the folder that it is put in, also with a suffix behind it."""
    printable = name.isprintable() and len(name.encode(errors="replace")) <= LONGEST_NAME
    return printable and name not in ("", ".", "..") and not set(name) & set("/\\:")


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path in a folder is, links followed, a file or folder elsewhere.

    Files of the hub's cache belong to it: a snapshot links to `../../blobs`, which can be a link
    itself, and older `--local-dir` downloads link to a `blobs` far away.
    """
    try:
        home, target = folder.resolve(), path.resolve()
        for place in (home, *home.parents):
            blobs = place.parent.parent / "blobs"
            if place.parent.name == "snapshots" and _REPOSITORY.match(blobs.parent.name):
                hashed = _BLOB.fullmatch(target.name) and target.parent == blobs.resolve()
                if hashed or target.is_relative_to(blobs):
                    return False
    except (OSError, RuntimeError):  # links in a circle
        return True
    if target.is_relative_to(home):
        return False
    blobs = target.parent
    in_cache = blobs.name == "blobs" and _REPOSITORY.match(blobs.parent.name)
    return not (in_cache and _BLOB.fullmatch(target.name))


def visible(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder as `os.walk` does, sorted, without hidden names and Python environments."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not Path(parent, name, "pyvenv.cfg").is_file()
        )
        yield parent, folders, sorted(name for name in names if not name.startswith("."))


def link_out(folder: Path, everything: bool = False) -> Path | None:
    """Return the first link below a folder that leads out: a visible one to a file, or any."""
    for parent, folders, names in os.walk(folder) if everything else visible(folder):
        for name in sorted((*folders, *names) if everything else names):
            path = Path(parent, name)
            if path.is_symlink() and leads_out(path, folder):
                return path
    return None


def check_writable(folder: Path) -> None:
    """Raise OSError where no file can be written to a folder, made if missing; leave nothing."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def cache_folder() -> Path:
    """Return `HERETIC_KL_CACHE`, or else the folder that the platform has for caches."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return expanded(folder)
    from platformdirs import user_cache_path

    return user_cache_path("heretic-kl", appauthor=False)


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex, read in blocks.

    Raises:
        OSError: The file cannot be read.
    """
    import hashlib

    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that readers see complete, old or new.

    Raises:
        OSError: It cannot be written; what stood there still stands.
    """
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def new_file(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a path to write to; the file takes the name `target` when the block ends well.

    Raises:
        FileExistsError: `replace` is False and there is such a file, also since the block began.
        OSError: It cannot be written; what stood there still stands.
    """
    target = target.absolute()
    with _partial(target, Path.touch) as partial:
        yield partial
        _flush(partial)
        if replace or not _linked(partial, target):
            os.replace(partial, target)
        _flush(target.parent)


def _linked(partial: Path, target: Path) -> bool:
    """Give a file a second name that is free; False: this file system knows no second names.

    Raises:
        FileExistsError: The name is taken.
    """
    try:
        os.link(partial, target)
    except FileExistsError:
        raise
    except OSError:
        if target.exists():
            raise FileExistsError(f"{target} exists") from None
        return False
    return True


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it takes the name `target` when the block ends well.

    What stood at `target` is replaced.

    Raises:
        OSError: It cannot be written; what stood there still stands.
    """
    target = target.absolute()
    with _partial(target, Path.mkdir) as partial:
        yield partial
        _flush_tree(partial)
        _replace_folder(partial, target)


@contextmanager
def _partial(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with ExitStack() as stack:
        partial = _hidden(target, "partial")
        make(partial)
        stack.callback(_remove, partial)
        stack.callback(_unlock, _lock(partial))
        yield partial


def remove_leftovers(target: Path) -> None:
    """Remove what killed processes left beside `target`, or put it back.

    A replaced folder whose successor never took its name becomes `target` again.
    """
    if not target.parent.is_dir():
        return
    for mark in ("old", "partial"):
        prefix = f".{target.name}.{mark}-"
        for leftover in sorted(target.parent.iterdir()):
            if not leftover.name.startswith(prefix):
                continue
            lock = _lock(leftover)
            if lock is None:
                continue  # its process lives, or this file system has no locks
            try:
                if mark == "old" and not target.exists():
                    leftover.rename(target)
                else:
                    _remove(leftover)
            finally:
                _unlock(lock)


def _replace_folder(partial: Path, target: Path) -> None:
    """Rename a complete folder; what stood there is removed last."""
    old: Path | None = None
    lock: int | None = None
    try:
        if target.exists():
            lock = _lock(target)
            old = _hidden(target, "old")
            target.rename(old)
        try:
            partial.rename(target)
        except BaseException:
            if old is not None:
                old.rename(target)
            raise
        _flush(target.parent)
        if old is not None:
            _remove(old)
    finally:
        _unlock(lock)


def holds_files(folder: Path) -> bool:
    """Whether a folder can be listed and is not empty."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def free_folder(folder: Path) -> Path:
    """The folder itself, or `NAME-2` and so on: the first that is missing or an empty folder."""
    candidates = (folder.parent / f"{folder.name or 'model'}-{n}" for n in count(2))
    return next(
        place
        for place in chain([folder], candidates)
        if not holds_files(place) and (place.is_dir() or not os.path.lexists(place))
    )


def _hidden(target: Path, mark: str) -> Path:
    return target.with_name(f".{target.name}.{mark}-{secrets.token_hex(4)}")


def _lock(path: Path) -> int | None:
    """Lock a file or folder for this process; None: another process has it, or it has no locks."""
    try:
        import fcntl

        descriptor = os.open(path, os.O_RDONLY)
    except (ImportError, OSError):  # ImportError: Windows, where no leftovers are removed
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _flush_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(Path(parent, name))
        _flush(Path(parent))


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders
    flags = os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
