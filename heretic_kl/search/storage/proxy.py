"""The gRPC proxy in front of a database: many workers, one cache. Needs gRPC, an extra."""

from __future__ import annotations

import importlib
import socket
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy

from heretic_kl.errors import StudyError

PROXY_SCHEME = "grpc://"
DEFAULT_PORT = 13000
CONNECT_SECONDS = 30.0
THREADS = 16
MISSING = "its packages are not installed: pip install 'heretic-kl[grpc]'"


def connect(url: str) -> GrpcStorageProxy:
    """The storage behind a proxy.

    Args:
        url: `grpc://HOST:PORT`.

    Raises:
        StudyError: nobody answers there, or gRPC is not installed.
    """
    host_and_port(url)
    _require_grpc(url)
    storage = open_channel(url)
    try:
        storage.wait_server_ready(CONNECT_SECONDS)
    except ConnectionError as error:
        raise StudyError(
            f"nobody answers at {url}: start `heretic-kl storage serve` there"
        ) from error
    return storage


def open_channel(url: str) -> GrpcStorageProxy:
    """The same, without waiting for an answer."""
    from heretic_kl.search.storage.proxy_calls import Proxy

    host, port = host_and_port(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return Proxy(host=host, port=port)


def run_proxy(
    storage: BaseStorage, host: str, port: int, ready: Callable[[], None] = lambda: None
) -> None:
    """Answer for a storage until the process is interrupted.

    Args:
        storage: a database with its cache.
        host: the address to listen at. Whoever reaches it may read and change every study.
        port: of that address.
        ready: called when the address is free.

    Raises:
        StudyError: the address cannot be used, or gRPC is not installed.
    """
    _require_grpc(f"{PROXY_SCHEME}{host}:{port}")
    from optuna.storages._grpc.server import make_server

    from heretic_kl.search.storage.proxy_calls import handler

    try:  # gRPC itself would share a port that is in use
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise StudyError(f"cannot listen at {host}:{port}: {error.strerror}") from error
    ready()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        server = make_server(storage, host, port, ThreadPoolExecutor(THREADS))
    server.add_generic_rpc_handlers((handler(storage),))
    server.start()
    server.wait_for_termination()


def host_and_port(url: str) -> tuple[str, int]:
    """Of `grpc://HOST:PORT`; the port may be left out.

    Raises:
        StudyError: it names no host, or its port is no number.
    """
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.hostname and not parts.path.strip("/"):
            return parts.hostname, parts.port or DEFAULT_PORT
    raise StudyError(f"cannot open storage {url!r}: write grpc://HOST:PORT")


def _require_grpc(what: str) -> None:
    try:
        for module in ("grpc", "google.protobuf"):
            importlib.import_module(module)
    except ImportError as error:
        raise StudyError(f"cannot open storage {what!r}: {MISSING}") from error
