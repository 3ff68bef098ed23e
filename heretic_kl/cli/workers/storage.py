"""`heretic-kl storage serve`: the gRPC proxy in front of a database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from heretic_kl.cli.command import PROGRAM, SUMMARIES, Command
from heretic_kl.config import ProgramSettings, read_settings
from heretic_kl.config.tables import Text, Whole, setting
from heretic_kl.errors import ConfigError


class StorageSettings(ProgramSettings):
    """Which database, and where it is served."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Storage": ("action", "storage", "host", "port"),
        "Output": ("quiet", "debug"),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Storage", "Output")
    everywhere: ClassVar[frozenset[str]] = frozenset({"storage"})

    action: Text | None = setting(None, "serve", metavar="ACTION")
    storage: Text | None = setting(None, "Storage URL of the database", metavar="URL")
    host: Text = setting("127.0.0.1", "Address to listen on; there is no password")
    port: Whole = setting(13000, "Port to listen on", ge=1, le=65535)


def run(words: Sequence[str]) -> int:
    """Serve until interrupted; return the exit code."""
    settings = read_settings(StorageSettings, words)
    if settings.action != "serve":
        raise ConfigError(f"write `{PROGRAM} storage serve --storage URL`")
    if settings.storage is None:
        raise ConfigError("name the database to serve: --storage postgresql+psycopg://HOST/NAME")
    from heretic_kl.cli.output import observing
    from heretic_kl.events import Notice, Result
    from heretic_kl.search import quiet_optuna, serve, without_password

    quiet_optuna()
    with observing(quiet=settings.quiet) as observer:
        place = f"grpc://{settings.host}:{settings.port}"
        shown = without_password(settings.storage)

        def ready() -> None:
            observer(Notice(f"serving {shown} at {place}"))
            observer(Result("storage", {"storage": shown, "address": place}))

        serve(settings.storage, settings.host, settings.port, ready=ready)
    return 0


COMMAND = Command(
    "storage serve --storage URL [--host ADDRESS] [--port PORT]",
    f"{SUMMARIES['storage']}. Workers connect with --storage grpc://HOST:PORT. There is no "
    "password and no encryption: keep the address local, or inside a network that you trust.",
    run,
    StorageSettings,
    first_words=("--action",),
)
