"""Servers for tests, thrown away afterwards: databases that are installed, the gRPC proxy."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from heretic_kl.search import serve

HOME = Path(__file__).parents[2]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """A server that a test stops and starts again."""

    def __init__(self, url, start, stop):
        self.url, self.start, self.stop = url, start, stop


@contextmanager
def database(kind):
    """Yields the storage URL of a database server of this kind."""
    with DATABASES[kind]() as server:
        yield server.url


def postgresql():
    """The same of PostgreSQL."""
    return database("postgresql")


@contextmanager
def postgresql_server():
    """Yields a `Server`; skips the test where there is no server program."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = programs[-1] if programs else shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed")
    # The server refuses to run as root.
    as_user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    data = Path(tempfile.mkdtemp(prefix="postgresql-"))  # its user may not enter pytest's folders
    if as_user:
        shutil.chown(data, "postgres")

    def call(name, *words):
        program = str(Path(initdb).with_name(name))
        subprocess.run([*as_user, program, *words], check=True, capture_output=True, timeout=60)

    port = free_port()
    options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories={data}"
    call("initdb", "-D", str(data / "db"), "-A", "trust", "-U", "me", "--no-sync", "-E", "UTF8")
    start = ("-w", "-l", str(data / "log"), "-o", options, "start")
    server = Server(
        f"postgresql+psycopg://me@127.0.0.1:{port}/studies",
        lambda: call("pg_ctl", "-D", str(data / "db"), *start),
        lambda: call("pg_ctl", "-D", str(data / "db"), "-m", "immediate", "-w", "stop"),
    )
    server.start()
    try:
        call("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "me", "studies")
        yield server
    finally:
        if (data / "db" / "postmaster.pid").exists():
            server.stop()
        shutil.rmtree(data)


@contextmanager
def mysql_server():
    """Yields a `Server`: MariaDB, killed to stop; skips the test where it is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"  # which Debian leaves out
    program, install = (shutil.which(n, path=path) for n in ("mariadbd", "mariadb-install-db"))
    if program is None or install is None:
        pytest.skip("MariaDB is not installed")
    data = Path(tempfile.mkdtemp(prefix="mariadb-"))
    as_user = ["--user=mysql"] if os.geteuid() == 0 else []  # not as root
    if as_user:
        shutil.chown(data, "mysql")
    port = free_port()
    common = ["--no-defaults", f"--datadir={data / 'db'}", *as_user]
    more = ["--auth-root-authentication-method=normal", "--skip-test-db"]
    subprocess.run([install, *common, *more], check=True, capture_output=True, timeout=120)
    (data / "first.sql").write_text("CREATE DATABASE IF NOT EXISTS studies;\n")
    places = [f"--{name}={data / name}" for name in ("socket", "pid-file", "log-error")]
    network = ["--bind-address=127.0.0.1", f"--port={port}"]

    def begin():
        words = [program, *common, *network, *places, f"--init-file={data / 'first.sql'}"]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not greets(port):
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.1)
        return process

    try:
        with served(f"mysql+pymysql://root@127.0.0.1:{port}/studies", begin) as server:
            yield server
    finally:
        shutil.rmtree(data)


@contextmanager
def served(url, begin):
    """Yields a `Server` that runs; `begin` starts its process, which is killed to stop."""
    running = []

    def stop():
        for process in running:
            process.kill()
            process.communicate()
        running.clear()

    running.append(begin())
    try:
        yield Server(url, lambda: running.append(begin()), stop)
    finally:
        stop()


def greets(port):
    """Whether a server speaks first to whoever connects."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            return bool(connection.recv(1))
    except OSError:
        return False


DATABASES = {"postgresql": postgresql_server, "mysql": mysql_server}


@contextmanager
def proxy_server(url):
    """Yields a `Server`: the proxy in front of a database, in a process that is killed to stop."""
    port = free_port()
    words = [sys.executable, "-m", "heretic_kl", "storage", "serve", "--storage", url]

    def begin():
        process = subprocess.Popen(
            [*words, "--port", str(port)], stderr=subprocess.PIPE, text=True, cwd=HOME
        )
        assert "serving" in process.stderr.readline()
        return process

    with served(f"grpc://127.0.0.1:{port}", begin) as server:
        yield server


def proxy(url):
    """The URL of a proxy in front of a database, until the test process ends."""
    port, ready = free_port(), threading.Event()
    arguments = (url, "127.0.0.1", port, ready.set)
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    assert ready.wait(30)
    return f"grpc://127.0.0.1:{port}"
