"""Whether a folder is a model that heretic-kl saved, whole and unchanged. Asks nobody."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heretic_kl.errors import ExportError
from heretic_kl.export.checkpoint import PICKLES
from heretic_kl.export.folder import MODEL_MARKS
from heretic_kl.export.reproduction_reader import Reproduction, read_reproduction
from heretic_kl.export.reproduction_writer import CARD_FILE, LEARNED_FILE
from heretic_kl.files import TOKENS, sha256_file

FIGURES = "figures/"
"""Where `add_figures` puts pictures of the card."""


@dataclass(frozen=True)
class SavedFolder:
    """A folder that may be published."""

    path: Path
    form: Literal["merged", "lora"]
    trial: int
    files: tuple[str, ...]
    """What is published: paths in the folder, with `/`."""
    bytes: int
    left_out: tuple[str, ...]
    """Files of the folder that heretic-kl did not write."""
    names_base: bool
    """The card says which model of the hub this one was made from."""


def saved_folder(path: Path) -> SavedFolder:
    """Check a folder, the SHA-256 of every file included.

    What is published is what `reproduce.json` lists, that file, the card and its figures. The list
    may come from anyone: a name that leads out of the folder, and a link, are errors.

    Raises:
        ExportError: the folder is no saved model, not whole, changed, or holds pickles or a token.
        ReproductionError: reproduce.json is missing, or cannot be read.
    """
    place = repr(str(path))
    if not path.is_dir():
        raise ExportError(f"no folder {place}: name the folder of a saved model")
    try:
        reproduction = read_reproduction(path)
        present = dict(_files(path))
        names = _listed(path, reproduction, present)
        names_base = _check_card(path / CARD_FILE)
        names += [CARD_FILE, reproduction.path.name]
        names += [name for name in present if name.startswith(FIGURES) and name.endswith(".png")]
        for name in (CARD_FILE, reproduction.path.name):
            if TOKENS.search(present[name].read_text(encoding="utf-8")):
                raise ExportError(f"{name} in {place} holds what looks like a token: take it out")
        size = sum(present[name].stat().st_size for name in set(names))
    except OSError as error:
        raise ExportError(f"cannot read {place}: {error.strerror or error}") from error
    return SavedFolder(
        path=path,
        form=reproduction.form,
        trial=reproduction.trial.number,
        files=tuple(sorted(set(names))),
        bytes=size,
        left_out=tuple(sorted(set(present) - set(names))),
        names_base=names_base,
    )


def _listed(path: Path, reproduction: Reproduction, present: dict[str, Path]) -> list[str]:
    """The names that the reproduction file lists, each of them there and unchanged."""
    place, index = repr(str(path)), reproduction.files
    mark = MODEL_MARKS[reproduction.form == "lora"]
    weights = [name for name in index if name.endswith(".safetensors") and name != LEARNED_FILE]
    if mark not in index or not weights:
        raise ExportError(f"{place} holds no saved model: {mark} or its weights are not listed")
    for name, file in index.items():
        if name.lower().endswith(PICKLES):
            raise ExportError(
                f"{place} lists {name!r}, which can run code: only safetensors are published"
            )
        if name not in present:
            raise ExportError(
                f"{place} is not whole: {name!r} is missing; save it again, or copy all of it"
            )
        if present[name].stat().st_size != file.bytes or sha256_file(present[name]) != file.sha256:
            raise ExportError(
                f"{name!r} in {place} is not the file that was saved: the scores are not its own"
            )
    return list(index)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and path of every file below a folder.

    Raises:
        ExportError: one is a link, which may lead anywhere.
    """
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            if path.is_symlink():
                raise ExportError(f"{str(path)!r} is a link: put the file itself there")
            if name in names:
                yield path.relative_to(folder).as_posix(), path


def _check_card(path: Path) -> bool:
    """Whether the card names the original on the hub.

    Raises:
        ExportError: there is no card, or its front matter cannot be read.
    """
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not path.is_file():
        raise ExportError(f"{str(path.parent)!r} is not whole: the card {path.name} is missing")
    try:
        data = ModelCard(path.read_text(encoding="utf-8")).data
    except (ValueError, YAMLError) as error:
        line = (str(error).splitlines() or ["no YAML"])[0]
        raise ExportError(f"{str(path)!r}: its front matter cannot be read: {line}") from error
    return bool(data.get("base_model"))
