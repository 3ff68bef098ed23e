"""A saved model's folder put into a repository of the hub: private unless said otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from glob import escape
from typing import TYPE_CHECKING, Any

from heretic_kl._version import __version__
from heretic_kl.errors import NotEmptyError, UploadError
from heretic_kl.export.hub.client import (
    hub_client,
    hub_token,
    one_line_errors,
    quiet_client,
    writing_token,
)
from heretic_kl.export.hub.folder import SavedFolder

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

MAIN = "main"
KEPT_BY_HUB = ".gitattributes"
"""The one file of a new repository, which says how files are stored."""


@dataclass(frozen=True)
class Target:
    """Where a model goes."""

    repo: str
    """`USER/NAME`; `NAME` alone is a repository of whoever the token belongs to."""
    public: bool = False
    """May be seen by everyone; False: a repository that is public already is not used."""
    branch: str = MAIN
    overwrite: bool = False
    """Replace the files that the branch holds; its history keeps them."""


@dataclass(frozen=True)
class Uploaded:
    """What came of it."""

    repo: str
    """`USER/NAME`."""
    url: str
    """Of the branch."""
    commit: str
    private: bool


def check_upload(target: Target) -> Target:
    """Find out whether a model may go there, before anything is made; changes nothing.

    Returns:
        The target, its repository with the owner: `USER/NAME`.

    Raises:
        UploadError: nobody is logged in, the token may not write, or the repository is public and
            was not to be.
        NotEmptyError: the branch holds files, and `overwrite` is off.
    """
    api = hub_client(hub_token())
    with quiet_client(bars=False), one_line_errors(api):
        target = replace(target, repo=_full_name(api, target.repo))
        _check(api, target)
    return target


def upload(
    saved: SavedFolder,
    target: Target,
    *,
    message: str | None = None,
    bars: bool = False,
    notify: Callable[[str], None] | None = None,
) -> Uploaded:
    """Put a saved model into a repository, in one commit that leaves nothing else on the branch.

    Args:
        saved: what to upload.
        target: where to, as `check_upload` gives it; what that refuses is refused here too.
        message: of the commit.
        bars: let the hub's client show progress on stderr.
        notify: told what the hub warns of.

    Raises:
        UploadError: see `check_upload`; or the hub refuses or cannot be reached. What is in the
            folder stays as it is.
        NotEmptyError: the branch holds files, and `overwrite` is off.
    """
    api = hub_client(hub_token())
    with quiet_client(bars=bars, notify=notify), one_line_errors(api):
        name = target.repo
        if _check(api, target) is None:
            api.create_repo(name, private=not target.public)
        info = api.model_info(name)
        _check_visibility(api, info, target)
        if target.branch != MAIN and _branch(api, target) is None:
            api.create_branch(name, branch=target.branch)
        before = api.model_info(name, revision=target.branch)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=saved.path,
            revision=target.branch,
            allow_patterns=[escape(file) for file in saved.files],
            delete_patterns="*" if _files(before) else None,
            parent_commit=before.sha,  # or else somebody else's commit would be overwritten
            commit_message=message
            or f"Trial {saved.trial}, {saved.form}: heretic-kl {__version__}",
        )
    place = "" if target.branch == MAIN else f"/tree/{target.branch}"
    return Uploaded(name, f"{api.endpoint}/{name}{place}", commit.oid, bool(info.private))


def _full_name(api: HfApi, repo: str) -> str:
    """The repository with its owner; asks who the token belongs to, and whether it may write."""
    who: dict[str, Any] = api.whoami()
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UploadError(f"the token may only read: {writing_token(api.endpoint)}")
    return repo if "/" in repo else f"{who['name']}/{repo}"


def _check(api: HfApi, target: Target) -> ModelInfo | None:
    """What the hub says of the repository; None where there is none yet."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(target.repo)
    except RepositoryNotFoundError:
        return None
    _check_visibility(api, info, target)
    held = _branch(api, target)
    files = [] if held is None else _files(held)
    if files and not target.overwrite:
        raise NotEmptyError(
            f"{target.repo} is not empty (branch {target.branch}, {len(files)} files): nothing was "
            "uploaded; replace them with --overwrite (its history keeps them), or name another "
            "repository or branch"
        )
    return info


def _check_visibility(api: HfApi, info: ModelInfo, target: Target) -> None:
    if not target.public and info.private is not True:
        raise UploadError(
            f"{target.repo} is public, and a private repository was asked for: nothing was "
            f"uploaded; make it private at {api.endpoint}/{target.repo}/settings, name another, or "
            "pass --public"
        )


def _branch(api: HfApi, target: Target) -> ModelInfo | None:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.model_info(target.repo, revision=target.branch)
    except RevisionNotFoundError:
        return None


def _files(info: ModelInfo) -> list[str]:
    names = [file.rfilename for file in info.siblings or ()]
    return [name for name in names if name != KEPT_BY_HUB]
