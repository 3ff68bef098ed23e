"""Where a model may be saved, and what is said when it cannot be. Knows nothing about models."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from heretic_kl import files
from heretic_kl.errors import ExportError

MODEL_MARKS = ("config.json", "adapter_config.json")
"""A folder that holds one of these is a saved model; nothing else is ever overwritten."""

FULL_DISK = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""No space on the device, or none left of the user's share of it."""


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Refuse a target before any work is done.

    Args:
        target: where a model is to be saved.
        overwrite: a saved model that stands there may be replaced.
        source: the folder the model came from, which must survive.

    Raises:
        ExportError: the target is a file, is or holds the source, or is a folder that is not
            empty and either `overwrite` is off or it holds no saved model.
    """
    place = repr(str(target))
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ExportError(f"cannot save to {place}: the original model is there; name another")
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise ExportError(f"cannot save to {place}: a file of that name exists")
        if not any(target.iterdir()):
            return
    except OSError as error:
        raise ExportError(f"cannot save to {place}: {_reason(error)}") from error
    if not overwrite:
        raise ExportError(
            f"cannot save to {place}: it is not empty; name another folder or pass --overwrite"
        )
    if not any((target / mark).is_file() for mark in MODEL_MARKS):
        raise ExportError(
            f"cannot save to {place}: it holds something other than a saved model, which "
            "--overwrite does not replace; name another folder"
        )


@contextmanager
def new_folder(target: Path, *, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block is left without an exception.

    Args:
        target: the final name; see `check_target` for what may stand there.
        overwrite: see `check_target`.
        needed_bytes: what will be written; checked against the free space first.

    Yields:
        The empty partial folder, beside the target.

    Raises:
        ExportError: the disk is full or cannot be written. An interrupt passes through as it is.
            In every case the partial folder is removed and what stood at `target` still stands.
    """
    check_target(target, overwrite=overwrite)
    free: int | None = None
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(target.absolute())
        # A folder that a killed process had moved away may be back.
        check_target(target, overwrite=overwrite)
        free = shutil.disk_usage(target.absolute().parent).free
        if free < needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with files.new_folder(target) as partial:
            yield partial
    except (OSError, SafetensorError) as error:
        raise ExportError(_failure(target.absolute(), error, needed_bytes, free)) from error


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that readers see complete, old or new.

    Raises:
        ExportError: it cannot be written.
    """
    try:
        files.write_text(path, text)
    except OSError as error:
        raise ExportError(f"cannot write {str(path)!r}: {_reason(error)}") from error


def _failure(target: Path, error: Exception, needed: int, free: int | None) -> str:
    place = f"cannot save to {str(target)!r}"
    # safetensors reports the system's error as text.
    said_so = "no space left" in str(error).lower()
    if said_so or (isinstance(error, OSError) and error.errno in FULL_DISK):
        free_space = "" if free is None else f", {readable_size(free)} were free"
        return f"{place}: the disk is full (needs about {readable_size(needed)}{free_space})"
    return f"{place}: {_reason(error)}"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def readable_size(count: int) -> str:
    """A number of bytes for people, in decimal units."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
