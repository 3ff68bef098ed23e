"""Which files hold a model's weights, that none leads out of its folder, what their headers claim.

Reads no weights.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, Final

from heretic_kl.errors import UnsupportedModelError, plain_line
from heretic_kl.files import leads_out, link_out

INDEX_SUFFIX: Final = ".index.json"
LARGEST_HEADER: Final = 100_000_000
"""Bytes of a safetensors header, as the format itself limits it."""
_NUMBERS: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""GGUF's kind of a number -> its bytes."""
_TEXT, _ARRAY, _DEEPEST = 8, 9, 4
_MOST_AXES: Final = 64


def check_safetensors(path: Path) -> int:
    """Refuse a file whose header claims more than the file holds.

    Returns:
        The largest size of a tensor along one axis; 0: there is none.

    Raises:
        UnsupportedModelError: which file, and what its header claims.
    """
    size, largest = path.stat().st_size, 0
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            header: Any = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            if not 0 <= start <= end <= size - 8 - length:
                raise ValueError(f"a tensor that ends at byte {end} of {size - 8 - length}")
            elements = _elements(entry["shape"])
            if elements > 8 * (end - start) or min(entry["shape"], default=0) < 0:
                raise ValueError(f"a tensor of {elements} elements")
            largest = max(largest, *entry["shape"], 0)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise _refusal(path, "safetensors", e) from e
    return largest


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file whose header claims more than the file holds.

    Raises:
        UnsupportedModelError: which file, and what its header claims.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data)
            magic, version = header.number("<4s"), header.number("<I")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"version {version} of {magic!r}")
            tensors, facts = header.number("<Q"), header.number("<Q")
            for _ in range(facts):
                header.text()
                header.value(header.number("<I"))
            for _ in range(tensors):
                header.text()
                shape = [header.number("<Q") for _ in range(header.number("<I"))]
                header.number("<IQ")
                if _elements(shape) > 8 * len(data):
                    raise ValueError(f"a tensor of {_elements(shape)} elements")
    except (struct.error, ValueError, OverflowError) as error:
        raise _refusal(path, "GGUF", error) from error


def _elements(shape: Any) -> int:
    """The product of a shape; a long one takes hours, and one with texts or lists any memory."""
    if len(shape) > _MOST_AXES:
        raise ValueError(f"a tensor of {len(shape)} axes")
    if not all(type(size) is int for size in shape):
        raise ValueError("a tensor whose size is no whole number")
    return math.prod(shape)


class _Header:
    """Walks over a GGUF header; every step stays inside the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        self.at += struct.calcsize(form)
        return struct.unpack_from(form, self.data, self.at - struct.calcsize(form))[0]

    def text(self) -> None:
        self.skip(self.number("<Q"), "a text")

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in _NUMBERS:
            self.skip(_NUMBERS[kind], "a number")
        elif kind == _TEXT:
            self.text()
        elif kind == _ARRAY and depth < _DEEPEST:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _NUMBERS:
                self.skip(count * _NUMBERS[inner], "an array")
                return
            for _ in range(count):
                self.value(inner, depth + 1)
        else:
            raise ValueError(f"a value of kind {kind}, {depth} arrays deep")

    def skip(self, count: int, what: str) -> None:
        if count > len(self.data) - self.at:
            raise ValueError(f"{what} of {count} bytes")
        self.at += count


def _refusal(path: Path, kind: str, error: Exception) -> UnsupportedModelError:
    claim = str(error)[:100] if type(error) is ValueError else "what no such file has"
    return UnsupportedModelError(
        f"{str(path)!r} is no {kind} file, or is cut off: its header claims {claim}; "
        "download it again"
    )


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
    templates = folder / "additional_chat_templates"  # which transformers reads, whatever it is
    read = (templates, *sorted(templates.glob("*.jinja")))
    link = next((path for path in read if leads_out(path, folder)), None) or link_out(folder)
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
