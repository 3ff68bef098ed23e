"""Where a model comes from: a hub id, a folder or a GGUF file. Loads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError

from heretic_kl.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from heretic_kl.files import expanded
from heretic_kl.model.loading.adapters import ADAPTER_CONFIG
from heretic_kl.model.loading.headers import check_folder, check_gguf
from heretic_kl.model.out_of_memory import is_out_of_memory

_PINNED = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)@(?P<revision>\w[\w+-]*([./][\w+-]+)*)")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from."""

    name: str
    """As the user gave it: hub id, folder or GGUF file."""
    revision: str | None = None

    @classmethod
    def named(cls, text: str) -> ModelSource:
        """What a user names in one word: a path, a hub id, or ID@REVISION of the hub."""
        source, pinned = cls(text), _PINNED.fullmatch(text)
        if pinned is None or source.folder is not None or source.gguf_file is not None:
            return source
        return cls(pinned["id"], pinned["revision"])

    @property
    def gguf_file(self) -> Path | None:
        """The GGUF file, if the source is one."""
        path = expanded(self.name)
        return path if path.suffix.lower() == ".gguf" else None

    @property
    def folder(self) -> Path | None:
        """The local folder, if the source is one."""
        path = expanded(self.name)
        return path if path.is_dir() else None

    @property
    def adapter(self) -> Path | None:
        """The folder, if it holds a PEFT adapter and not a whole model."""
        folder = self.folder
        if folder is None or (folder / "config.json").is_file():
            return None
        return folder if (folder / ADAPTER_CONFIG).is_file() else None

    @property
    def looks_local(self) -> bool:
        """Whether the name can only be a path and not a hub id."""
        name = self.name
        return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name

    @property
    def short_name(self) -> str:
        """A name fit for a folder: the last part of the path or id."""
        if self.gguf_file is not None:
            return self.gguf_file.stem
        return self.name.split("/")[-1] if self.folder is None else self.folder.resolve().name


def check_exists(source: ModelSource) -> None:
    """Reject a name of something that does not exist.

    Raises:
        ModelNotFoundError: it does not exist, or holds no model.
        UnsupportedModelError: see `check_folder` and `check_gguf`.
    """
    name = source.name
    if source.gguf_file is not None:
        if not source.gguf_file.is_file():
            raise ModelNotFoundError(f"no such GGUF file: {name!r}")
        check_gguf(source.gguf_file)
        return
    if source.folder is not None:
        if not (source.folder / "config.json").is_file() and source.adapter is None:
            ggufs = sorted(source.folder.glob("*.gguf"))
            hint = f"; give the file itself, for instance {ggufs[0]}" if ggufs else ""
            raise ModelNotFoundError(f"folder {name!r} holds no config.json{hint}")
        check_folder(source.folder)
        return
    if source.looks_local or Path(name).exists():
        raise ModelNotFoundError(f"no model at {name!r}: give a folder, a .gguf file or a hub id")


def check_cached(source: ModelSource, commit: str | None) -> None:
    """Refuse a hub model that saving would refuse, for what its cached snapshot holds.

    Raises:
        UnsupportedModelError: see `check_folder`.
    """
    from huggingface_hub import try_to_load_from_cache

    if source.folder is None and source.gguf_file is None:
        file = try_to_load_from_cache(source.name, "config.json", revision=commit)
        if isinstance(file, str):
            check_folder(Path(file).parent)


def has_tokenizer(source: ModelSource) -> bool:
    """Whether a source has a tokenizer of its own; adapters often have none."""
    return source.adapter is None or (source.adapter / "tokenizer_config.json").is_file()


def hub_arguments(source: ModelSource) -> tuple[str, dict[str, Any]]:
    """Name or folder, and further arguments, for `from_pretrained`."""
    if source.gguf_file is not None:
        path = source.gguf_file.resolve()
        return str(path.parent), {"gguf_file": path.name}
    if source.folder is not None:
        return str(source.folder), {}
    return source.name, {} if source.revision is None else {"revision": source.revision}


@contextmanager
def readable_errors(source: ModelSource, what: str) -> Iterator[None]:
    """Turn errors of transformers about a bad source into one-line errors of ours."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        text = str(error)
        if "trust_remote_code" in text:
            raise UnsupportedModelError(
                f"{source.name!r} needs code from its own repository: read that code, then pass "
                "--trust-remote-code"
            ) from error
        if "ignore_mismatched_sizes" in text:
            raise UnsupportedModelError(
                f"cannot load the model of {source.name!r}: a tensor of its files has another "
                "shape than its config.json says: download it again"
            ) from error
        if "model.safetensors" in text:  # a shard that is missing has another name
            raise no_safetensors(source) from error
        kind = ModelNotFoundError if isinstance(error, OSError) else UnsupportedModelError
        reason = shorten(text, 240, placeholder=" ...")
        raise kind(f"cannot load the {what} of {source.name!r}: {reason}") from error


def no_safetensors(source: ModelSource) -> UnsupportedModelError:
    """The error for weights that are stored as pickles only."""
    return UnsupportedModelError(
        f"{source.name!r} has no safetensors weights; pickled weights are not read because they "
        "can run code: convert them first"
    )
