"""Opens storages: a journal file, a database, a proxy in front of one. Reads no study."""

from __future__ import annotations

import random
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage, InMemoryStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from sqlalchemy import Connection, create_engine, event, inspect
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from heretic_kl import files
from heretic_kl.errors import StudyError
from heretic_kl.ranks import is_first
from heretic_kl.search.storage.artifacts import ARTIFACTS_SUFFIX, ORIGINAL_SUFFIX
from heretic_kl.search.storage.database import CachedDatabase, Database
from heretic_kl.search.storage.journal import SharedJournalFile
from heretic_kl.search.storage.proxy import (
    PROXY_SCHEME,
    THREADS,
    connect,
    open_channel,
    run_proxy,
)
from heretic_kl.search.storage.roles import ROLES_SUFFIX
from heretic_kl.search.storage.steady import SteadyStorage

DRIVER_PACKAGES = {
    "MySQLdb": "mysqlclient",
    "psycopg": "psycopg[binary]",
    "psycopg2": "psycopg2-binary",
    "pymysql": "PyMySQL",
}
"""Module that a database needs -> the package that holds it, where the names differ."""

LOCKED_SECONDS = 60.0
"""How long a writer waits for SQLite while others write."""
TABLE_ATTEMPTS = 8
JOURNAL_SUFFIX = ".journal"
NOT_AS_WRITTEN = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    RecursionError,
)
"""What reading a study raises that nobody wrote, or that was damaged."""
HELPERS = (ROLES_SUFFIX, ARTIFACTS_SUFFIX, ORIGINAL_SUFFIX)
"""What names of studies end with that hold something else than trials."""


@contextmanager
def open_storage(
    url: str | None,
    folder: Path | str,
    name: str,
    notify: Callable[[str], None] = lambda message: None,
) -> Iterator[BaseStorage]:
    """The storage of one study, which other processes may use at the same time.

    A lost connection to a server is waited for; see `SteadyStorage`.

    Args:
        url: any Optuna storage URL, or `grpc://HOST:PORT`; None: a journal file
            `folder/name.journal`.
        folder: where journal files are kept; made if missing.
        name: the study's name.
        notify: told when a connection is lost.

    Raises:
        StudyError: the storage cannot be read or written.
    """
    if name and not files.is_file_name(name):
        raise StudyError(f"study {name!r} has a name that no file could have: rename it")
    if not is_first():  # it asks the first process, and never its storage
        yield InMemoryStorage()
        return
    if url is not None:
        with ExitStack() as stack:
            if url.startswith(PROXY_SCHEME):
                proxy = _steady_proxy(url, notify)
                stack.callback(proxy.close)
                yield proxy
            else:
                backend = _database(url)
                stack.callback(_disconnect, backend)
                yield _steady(backend, notify)
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
        file = place.removeprefix("sqlite:///")
        if file != place and not Path(file.partition("?")[0]).is_file():  # it would be made
            raise StudyError(f"there is no database {file!r} to read a study from (--storage)")
        if place.startswith(PROXY_SCHEME):
            return _steady_proxy(place)
        backend = _database(place)
        storage = _steady(backend)
        weakref.finalize(storage, _disconnect, backend).atexit = False
        return storage
    with _journal_problems(place):
        return JournalStorage(JournalFileBackend(str(place), JournalFileOpenLock(str(place))))


def serve(url: str, host: str, port: int, ready: Callable[[], None] = lambda: None) -> None:
    """Serve a database to `grpc://HOST:PORT` until the process is interrupted.

    Raises:
        StudyError: it is no database, cannot be opened, or the address cannot be used.
    """
    if url.startswith(PROXY_SCHEME):
        raise StudyError(f"{url} is itself a proxy: serve the database behind it")
    run_proxy(_steady(_database(url), patience=0), host, port, ready)  # its clients wait


def check_storage(url: str | None, folder: Path | str, name: str | None) -> None:
    """Raise what `open_storage` would raise, before a model is loaded for it.

    A journal's folder is checked, and not made.
    """
    if url is not None:
        with open_storage(url, folder, name or ""):
            return
    try:
        files.check_writable(Path(folder))
    except OSError as error:
        raise StudyError(f"cannot write studies in {str(folder)!r}: {error.strerror}") from error
    if name is not None and (Path(folder) / f"{name}{JOURNAL_SUFFIX}").exists():
        with open_storage(None, folder, name):
            return


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
    except NOT_AS_WRITTEN as error:
        raise StudyError(
            f"study file {str(path)!r} is damaged and cannot be read: move it away to start anew"
        ) from error


def _database(url: str) -> Database:
    """A database, its tables made if missing."""
    try:
        _make_tables(url)
        return _sqlite(url) if url.startswith("sqlite") else _server(url)
    except Exception as error:  # each database driver raises its own
        shown = without_password(url)
        raise StudyError(
            f"cannot open storage {shown!r}: {_storage_problem(url, error)}"
        ) from error


def _make_tables(url: str) -> None:
    """Make the tables of a new database; of processes that start together one is the first."""
    for attempt in range(TABLE_ATTEMPTS):
        tables = inspect(create_engine(url, poolclass=NullPool))
        if tables.has_table("alembic_version"):
            return  # it is the last one to be made
        if tables.has_table("studies") and tables.get_columns("studies")[0]["name"] != "study_id":
            raise StudyError("its table studies is another program's: name another database")
        try:
            Database(url, engine_kwargs={"poolclass": NullPool})
        except DBAPIError:
            if attempt == TABLE_ATTEMPTS - 1:
                raise
            time.sleep(random.uniform(0.1, 1.0))


def _server(url: str) -> Database:
    # A lost connection is replaced. Each thread of a proxy keeps one: opening them takes longer
    # than what they are asked.
    return Database(url, engine_kwargs={"pool_pre_ping": True, "pool_size": THREADS})


def _disconnect(backend: Database) -> None:
    """Let go of a database that nobody reads any more: a server counts its connections."""
    backend.remove_session()
    backend.engine.dispose()


def _steady(
    backend: Database,
    notify: Callable[[str], None] = lambda message: None,
    patience: float | None = None,
) -> BaseStorage:
    """A database with a cache: without it each call reads the study."""
    storage = CachedDatabase(backend)
    if backend.url.startswith("sqlite"):
        return storage  # a file: it is not lost but locked, and waits for that itself
    return SteadyStorage(storage, notify=notify, patience=patience)


def _steady_proxy(url: str, notify: Callable[[str], None] = lambda message: None) -> SteadyStorage:
    # An old channel waits for up to two minutes before it looks for its server again.
    return SteadyStorage(connect(url), open_again=lambda: open_channel(url), notify=notify)


def _sqlite(url: str) -> Database:
    """SQLite has no row locks: a transaction that reads before it writes takes the whole file."""
    storage = Database(url, engine_kwargs={"connect_args": {"timeout": LOCKED_SECONDS}})

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
    if isinstance(error, ModuleNotFoundError):
        package = DRIVER_PACKAGES.get(error.name or "", error.name)
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
