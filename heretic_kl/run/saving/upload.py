"""Uploads a saved model's folder, and tells what happens. Needs no session; prints nothing."""

from __future__ import annotations

from pathlib import Path

from heretic_kl.events import ModelUploaded, Observer
from heretic_kl.export import Target, check_upload, readable_size, saved_folder, upload
from heretic_kl.run.teller import Teller


def upload_folder(
    folder: Path,
    target: Target,
    observer: Observer,
    *,
    message: str | None = None,
    bars: bool = False,
) -> ModelUploaded:
    """Check a saved model's folder and put it on the hub; the folder stays as it is.

    Args:
        folder: what `Session.save` wrote.
        target: repository, visibility and branch.
        observer: told what happens.
        message: of the commit.
        bars: let the hub's client show progress on stderr.

    Raises:
        ExportError: the folder is no saved model, not whole, changed, or holds pickles or a token.
        ReproductionError: its reproduce.json cannot be read.
        UploadError: the hub refuses or cannot be reached; see `heretic_kl.export.upload`.
        NotEmptyError: the repository holds files, and `target.overwrite` is off.
    """
    tell = Teller(observer)
    saved = saved_folder(folder)
    if saved.left_out:
        shown = ", ".join(map(repr, saved.left_out[:3])) + (
            ", ..." if len(saved.left_out) > 3 else ""
        )
        tell.notice(f"not uploaded, because heretic-kl did not write it: {shown}")
    if not saved.names_base:
        tell.notice(
            "the card names no base model, because the original was a local folder: add "
            "`base_model: ORG/NAME` to the head of README.md if it is on the hub"
        )
    target = check_upload(target)
    size = readable_size(saved.bytes)
    with tell.stage("upload", f"Uploading {len(saved.files)} files, {size}, to {target.repo}"):
        uploaded = upload(saved, target, message=message, bars=bars, notify=tell.notice)
    if target.public and uploaded.private:
        tell.notice(f"{uploaded.repo} was private before and stays so: --public is for new ones")
    event = ModelUploaded(
        folder, uploaded.repo, uploaded.url, uploaded.commit, uploaded.private, len(saved.files)
    )
    tell(event)
    return event
