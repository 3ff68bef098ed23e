"""Where a study is kept: a journal file that survives kill -9, or any Optuna storage URL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

from heretic_kl.errors import StudyError

DRIVER_PACKAGES = {
    "MySQLdb": "mysqlclient",
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "pymysql": "PyMySQL",
}
"""Module that a database needs -> the package that holds it, where the names differ."""


JOURNAL_SUFFIX = ".journal"


@contextmanager
def open_storage(url: str | None, folder: Path | str, name: str) -> Iterator[BaseStorage]:
    """The storage of one study; a journal file is held by this process alone meanwhile.

    The lock file beside the journal stays: were it removed, a process that had opened it before
    and one that makes it anew could both hold the study.

    Args:
        url: any Optuna storage URL; None: a journal file `folder/name.journal`.
        folder: where journal files are kept; made if missing.
        name: the study's name.

    Raises:
        StudyError: the storage cannot be read or written, or another process holds it.
    """
    if url is not None:
        yield _storage_from_url(url)
        return
    path = Path(folder) / f"{name}{JOURNAL_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.in-use")
        lock.acquire(timeout=0)
    except Timeout:
        raise StudyError(
            f"study {path} is in use by another process: wait for it, or choose another "
            "--study-name"
        ) from None
    except OSError as error:
        raise StudyError(f"cannot write studies in {str(folder)!r}: {error.strerror}") from error
    try:
        yield _journal(path)
    finally:
        lock.release()


def storage_for_reading(place: Path | str) -> BaseStorage:
    """A journal file (a path) or a storage URL (text), to be read while others may write it.

    Raises:
        StudyError: it cannot be read.
    """
    if isinstance(place, str):
        return _storage_from_url(place)
    with _journal_problems(place):
        return JournalStorage(JournalFileBackend(str(place), JournalFileOpenLock(str(place))))


def check_storage(url: str | None, folder: Path | str, name: str | None) -> None:
    """Raise what `open_storage` would raise, before a model is loaded for it.

    Where the study's name is not known yet, a journal's folder is checked.
    """
    if url is not None or name is not None:
        with open_storage(url, folder, name or ""):
            return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise StudyError(f"cannot write studies in {str(folder)!r}: {error.strerror}") from error


def _journal(path: Path) -> BaseStorage:
    with _journal_problems(path):
        repair_journal(path)
        backend = JournalFileBackend(str(path), JournalFileOpenLock(str(path)))
        return JournalStorage(backend)


@contextmanager
def _journal_problems(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StudyError(f"cannot use study file {str(path)!r}: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise StudyError(
            f"study file {str(path)!r} is damaged and cannot be read: move it away to start anew"
        ) from error


def repair_journal(path: Path) -> None:
    """Undo what a process killed in the middle of a write leaves behind.

    A last line without its end would swallow the next one, and a lock file of a dead process
    would make every write wait. Call it only while no other process writes.
    """
    Path(f"{path}.lock").unlink(missing_ok=True)
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())


def _storage_from_url(url: str) -> BaseStorage:
    try:
        return get_storage(url)
    except Exception as error:  # each database driver raises its own
        shown = without_password(url)
        raise StudyError(
            f"cannot open storage {shown!r}: {_storage_problem(url, error)}"
        ) from error


def _storage_problem(url: str, error: Exception) -> str:
    """Say in one line what is wrong with a storage, and what to do."""
    scheme, separator, _ = url.partition("://")
    missing = error.__cause__ or error.__context__
    if isinstance(error, ImportError) and isinstance(missing, ModuleNotFoundError):
        package = DRIVER_PACKAGES.get(missing.name or "", missing.name)
        return f"its driver is not installed: pip install '{package}'"
    if not separator or type(error).__name__ in ("NoSuchModuleError", "ArgumentError"):
        what = f"unknown scheme {scheme!r}" if separator else "not a URL"
        return f"{what}; write sqlite:///FILE, postgresql://HOST/NAME or mysql://HOST/NAME"
    text = str(error).strip().replace(url, without_password(url))
    return (text.splitlines() or [type(error).__name__])[0]


def without_password(url: str) -> str:
    """A storage URL fit to be shown."""
    scheme, separator, rest = url.partition("://")
    credentials, at, place = rest.rpartition("@")
    if not at:
        return url
    return f"{scheme}{separator}{credentials.split(':')[0]}:***@{place}"
