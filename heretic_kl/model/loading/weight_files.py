"""Which files of a model's folder hold its weights, and that none leads out of it. Reads none."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from heretic_kl.errors import UnsupportedModelError, plain_line
from heretic_kl.files import leads_out, link_out
from heretic_kl.model.loading.headers import check_safetensors

INDEX_SUFFIX = ".index.json"


def weight_files(folder: Path) -> list[str]:
    """The safetensors files that `transformers` loads from a folder, in its order of preference.

    Returns:
        Paths in the folder, with `/`; none, where it has no such weights.

    Raises:
        UnsupportedModelError: a config or an index names a file outside the folder, or one that
            is no safetensors file; or an index is none.
    """
    config = _json(folder / "config.json")
    stated = config.get("transformers_weights") if isinstance(config, dict) else None
    for name in (stated, "model.safetensors", "model.safetensors.index.json"):
        if not isinstance(name, str):
            continue
        _check_name(folder, name, "config.json" if name is stated else None)
        if not (folder / name).is_file():
            continue
        if not name.endswith(INDEX_SUFFIX):
            return [name]
        index = _json(folder / name)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise UnsupportedModelError(
                f"{str(folder / name)!r} has no table weight_map of file names: download it again"
            )
        for shard in set(shards.values()):
            _check_name(folder, shard, name)
        return sorted(set(shards.values()))
    return []


def check_folder(folder: Path) -> None:
    """Refuse a folder of a model or adapter that leads elsewhere, or claims more than it holds.

    Raises:
        UnsupportedModelError: see `weight_files`; a link leads out of the folder; or the header of
            a file of weights claims more than the file holds.
    """
    link = link_out(folder)
    if link is not None:
        raise UnsupportedModelError(
            f"{plain_line(str(link))!r} is a link that leads out of the model's folder: put the "
            "file itself there"
        )
    stated = [folder / name for name in weight_files(folder)]
    for file in sorted({*folder.glob("*.safetensors"), *stated}):
        if file.is_file():
            check_safetensors(file)


def _check_name(folder: Path, name: str, where: str | None) -> None:
    """Refuse a name that leads out of the folder by itself or by a link, or is of another kind."""
    parts = re.split(r"[/\\]", name)
    inside = name.isprintable() and ":" not in name and not {"", ".", ".."} & set(parts)
    if not inside or leads_out(folder / name, folder):
        place = "" if where is None else f", which {where} names,"
        raise UnsupportedModelError(
            f"{str(folder)!r}: {plain_line(name)!r}{place} is not a file in the model's folder"
        )
    if not name.endswith((".safetensors", INDEX_SUFFIX)):
        raise UnsupportedModelError(
            f"{str(folder)!r}: {where} names {plain_line(name)!r} as a file of weights, and only "
            "safetensors are read"
        )


def _json(path: Path) -> Any:
    """What a JSON file holds; None where it cannot be read, which `transformers` reports."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
