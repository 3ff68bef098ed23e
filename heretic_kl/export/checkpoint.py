"""The files a model was loaded from: its shards, its other files. Edits and writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from heretic_kl.errors import ExportError, ModelError
from heretic_kl.export.hub.client import quiet_client
from heretic_kl.export.shards import Shard, open_shard
from heretic_kl.files import leads_out, visible
from heretic_kl.model import LanguageModel
from heretic_kl.model.loading.headers import weight_files

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
"""Formats that can run code when they are read: never copied."""
OTHER_WEIGHTS = (".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".tflite", ".ot")
"""Formats that hold the same weights again, unedited: not copied either."""
RENAMED = {
    "README.md": "README.original",
    "reproduce.json": "reproduce.original",
    "heretic-kl.json": "heretic-kl.original",
    "reproduce/learned.safetensors": "reproduce/learned.original",
}
"""Files of the original whose names ours take; they are kept under these stems."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the safetensors files that `transformers` reads from it."""

    folder: Path
    shards: Mapping[str, Shard]
    """By file name."""

    def shard_of(self, tensor: str) -> Shard | None:
        """The file that holds a tensor, or None."""
        for shard in self.shards.values():
            if tensor in shard.tensors:
                return shard
        return None

    @property
    def tensors(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(name for shard in self.shards.values() for name in shard.tensors)


def find_checkpoint(lm: LanguageModel) -> Checkpoint | None:
    """The original's files; None for a GGUF file and where they cannot be had.

    Raises:
        ExportError: a file that is there cannot be read, or is named and not in the folder.
    """
    folder = original_folder(lm)
    if folder is None:
        return None
    try:
        names = weight_files(folder)
        shards = {name: open_shard(folder / name) for name in names}
    except ModelError as error:
        raise ExportError(str(error)) from error
    except OSError as error:
        raise ExportError(
            f"the original's weights cannot be read again: {error.strerror or error}"
        ) from error
    return Checkpoint(folder, shards) if shards else None


def original_folder(lm: LanguageModel) -> Path | None:
    """The folder the model came from, a hub model's snapshot; None for a GGUF file or adapter."""
    if lm.source.gguf_file is not None or lm.source.adapter is not None:
        return None  # no file holds these weights
    return lm.source.folder or _snapshot(lm)


def original_commit(lm: LanguageModel) -> str | None:
    """The hub commit that was loaded, or the revision that was asked for."""
    commit = getattr(getattr(lm.model, "config", None), "_commit_hash", None)
    return str(commit) if commit else lm.source.revision


def other_files(checkpoint: Checkpoint, edited: Collection[str], target: Path) -> dict[str, Path]:
    """What goes along with the weights: path in the new folder -> file of the original.

    Pickles and the unedited weights in further formats are left out.

    Args:
        checkpoint: the original.
        edited: names of the edited tensors; a further safetensors file that holds one of them
            is an unedited copy of the weights and left out.
        target: where the new folder will be; not read, should it lie inside the original.

    Raises:
        ExportError: a file is a link that leads out of the original's folder.
    """
    copies: dict[str, Path] = {}
    for path in _walk(checkpoint.folder, target.resolve()):
        name, suffix = path.relative_to(checkpoint.folder).as_posix(), path.suffix.lower()
        if name in checkpoint.shards or suffix in PICKLES + OTHER_WEIGHTS:
            continue
        if path.is_symlink() and leads_out(path, checkpoint.folder):
            raise ExportError(f"{str(path)!r} is a link that leads out of the model's folder")
        if not _repeats_weights(path, edited):
            copies[name] = path
    for taken, stem in RENAMED.items():
        if taken in copies:
            copies[_free_name(stem, Path(taken).suffix, copies)] = copies.pop(taken)
    return copies


def _snapshot(lm: LanguageModel) -> Path | None:
    """The folder of a hub model, with the files that loading alone does not fetch."""
    from huggingface_hub import snapshot_download

    skipped = [f"*{suffix}" for suffix in PICKLES + OTHER_WEIGHTS] + ["*consolidated*"]
    with quiet_client(bars=False):
        for only_cached in (False, True):
            try:
                folder = snapshot_download(
                    lm.source.name,
                    revision=original_commit(lm),
                    ignore_patterns=skipped,
                    local_files_only=only_cached,
                )
            except (OSError, ValueError):
                continue
            return Path(folder)
    return None


def _walk(folder: Path, excluded: Path) -> Iterator[Path]:
    """Files below a folder that can be seen, the excluded folder apart."""
    for root, folders, files in visible(folder):
        folders[:] = [name for name in folders if Path(root, name).resolve() != excluded]
        yield from (path for name in files if (path := Path(root, name)).is_file())


def _repeats_weights(path: Path, edited: Collection[str]) -> bool:
    if path.suffix != ".safetensors":
        return False
    if path.name.startswith("consolidated"):
        # Mistral's second copy, under tensor names of its own.
        return True
    return any(name in edited for name in open_shard(path).tensors)


def _free_name(stem: str, suffix: str, taken: Collection[str]) -> str:
    name, number = f"{stem}{suffix}", 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}{suffix}"
    return name
