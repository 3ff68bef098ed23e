"""Opens storages: a journal file, a database, a proxy in front of one. Reads no study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from sqlalchemy import Connection, event

from heretic_kl.errors import StudyError
from heretic_kl.search.storage.artifacts import ARTIFACTS_SUFFIX
from heretic_kl.search.storage.journal import SharedJournalFile
from heretic_kl.search.storage.proxy import PROXY_SCHEME, connect
from heretic_kl.search.storage.roles import ROLES_SUFFIX

DRIVER_PACKAGES = {
    "MySQLdb": "mysqlclient",
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "pymysql": "PyMySQL",
}
"""Module that a database needs -> the package that holds it, where the names differ."""

LOCKED_SECONDS = 60.0
"""How long a writer waits for SQLite while others write."""
JOURNAL_SUFFIX = ".journal"
HELPERS = (ROLES_SUFFIX, ARTIFACTS_SUFFIX)
"""What names of studies end with that hold something else than trials."""


@contextmanager
def open_storage(url: str | None, folder: Path | str, name: str) -> Iterator[BaseStorage]:
    """The storage of one study, which other processes may use at the same time.

    Args:
        url: any Optuna storage URL, or `grpc://HOST:PORT`; None: a journal file
            `folder/name.journal`.
        folder: where journal files are kept; made if missing.
        name: the study's name.

    Raises:
        StudyError: the storage cannot be read or written.
    """
    if url is not None:
        storage = connect(url) if url.startswith(PROXY_SCHEME) else database(url)
        try:
            yield storage
        finally:
            storage.remove_session()
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(f"cannot write studies in {str(folder)!r}: {error.strerror}") from error
    path = Path(folder) / f"{name}{JOURNAL_SUFFIX}"
    with _journal_problems(path):
        storage = JournalStorage(SharedJournalFile(path))
    yield storage


def storage_for_reading(place: Path | str) -> BaseStorage:
    """A journal file (a path) or a storage URL (text), to be read while others may write it.

    Raises:
        StudyError: it cannot be read.
    """
    if isinstance(place, str):
        return connect(place) if place.startswith(PROXY_SCHEME) else database(place)
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


def study_names(storage: BaseStorage) -> list[str]:
    """The studies of a storage, those that only help others left out."""
    names = (study.study_name for study in storage.get_all_studies())
    return [name for name in names if not name.endswith(HELPERS)]


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


def database(url: str) -> BaseStorage:
    """A database, with the cache without which each call would read the whole study.

    Raises:
        StudyError: it cannot be opened.
    """
    try:
        return get_storage(_sqlite(url) if url.startswith("sqlite") else _server(url))
    except Exception as error:  # each database driver raises its own
        shown = without_password(url)
        raise StudyError(
            f"cannot open storage {shown!r}: {_storage_problem(url, error)}"
        ) from error


def _server(url: str) -> RDBStorage:
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # a lost connection is replaced


def _sqlite(url: str) -> RDBStorage:
    """SQLite has no row locks: a transaction that reads before it writes takes the whole file."""
    storage = RDBStorage(url, engine_kwargs={"connect_args": {"timeout": LOCKED_SECONDS}})

    def begin_nothing(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(storage.engine, "connect", begin_nothing)
    event.listen(storage.engine, "begin", begin)
    storage.engine.dispose()  # connections made before
    return storage


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
