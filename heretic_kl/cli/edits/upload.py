"""`heretic-kl upload`: a saved model's folder put on the hub. Loads no model."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.config import ProgramSettings, read_settings
from heretic_kl.config.tables import Location, Text, setting
from heretic_kl.errors import ConfigError, UploadError

if TYPE_CHECKING:
    from heretic_kl.events import Observer
    from heretic_kl.export import Target

PUBLIC = "Create a repository that everyone sees (default: private)"


class UploadSettings(ProgramSettings):
    """Which folder, and where to."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Upload": ("folder", "repo", "public", "branch", "message", "overwrite"),
        "Output": ("quiet", "debug"),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Upload", "Output")

    folder: Location | None = setting(None, "Folder of a saved model (required)", metavar="FOLDER")
    repo: Text | None = setting(
        None, "USER/NAME, or NAME for one of yours (default: the folder's name)", metavar="NAME"
    )
    public: bool = setting(False, PUBLIC)
    branch: Text = setting("main", "Branch, made where there is none", metavar="NAME")
    message: Text | None = setting(None, "Message of the commit (default: the trial)")
    overwrite: bool = setting(False, "Replace what the branch holds; its history keeps the old")


def run(words: Sequence[str]) -> int:
    """Upload what the command line names; return the exit code.

    Raises:
        HereticKLError: the folder is no saved model, or the hub refuses; one line each.
    """
    settings = read_settings(UploadSettings, words)
    if settings.folder is None:
        raise ConfigError("no folder given: name the folder of a saved model")

    from heretic_kl.export import Target

    repo = settings.repo or settings.folder.resolve().name
    target = Target(repo, settings.public, settings.branch, settings.overwrite)
    with observing(quiet=settings.quiet) as observer:
        put(settings.folder, target, observer, quiet=settings.quiet, message=settings.message)
    return 0


def put(
    folder: Path, target: Target, observer: Observer, *, quiet: bool, message: str | None = None
) -> None:
    """Upload a folder, with the progress of the hub's client where somebody watches it."""
    from heretic_kl.run.saving.upload import upload_folder

    bars = sys.stderr.isatty() and not quiet and not writes_json()
    upload_folder(folder, target, observer, message=message, bars=bars)


def put_saved(folder: Path, target: Target, observer: Observer, *, quiet: bool) -> None:
    """Upload what was just saved; an error says that it is there, and how to try again.

    Raises:
        UploadError: see `heretic_kl.export.upload`.
    """
    try:
        put(folder, target, observer, quiet=quiet)
    except UploadError as error:
        words = ["heretic-kl", "upload", str(folder), "--repo", target.repo]
        again = shlex.join([*words, *(["--public"] if target.public else [])])
        raise UploadError(f"{error}; the model is in {folder}: try again with `{again}`") from None


COMMAND = Command(
    "upload FOLDER [--repo NAME] [--public] [--FLAG VALUE ...]",
    f"{SUMMARIES['upload']}: a merged model or an adapter, with its card and reproduce.json. The "
    "repository is private unless --public is given. The token is that of `hf auth login` or "
    "HF_TOKEN; HF_ENDPOINT names another hub. No model is loaded.",
    run,
    UploadSettings,
    first_words=("--folder",),
)
