"""One safetensors file rewritten into another, tensor by tensor. Knows nothing about models.

Peak memory is one tensor. What is neither edited nor cast is copied as raw bytes, so types that
torch does not know survive too, and a file whose types stay has the same header, byte for byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import torch
from torch import Tensor

from heretic_kl.errors import ExportError

FLOAT_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types that can be edited and cast; all others are copied."""
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
COPY_BYTES = 2**24

TensorEdit: TypeAlias = Callable[[Tensor], Tensor]
"""stored tensor -> edited tensor of the same shape, float32."""


class StoredTensor(NamedTuple):
    """Where a tensor lies in the data part of its file."""

    type_name: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """A safetensors file, its header read."""

    path: Path
    header: bytes
    """As it stands in the file, padding included."""
    tensors: Mapping[str, StoredTensor]
    """In the order of their data."""
    metadata: Mapping[str, str] | None

    @property
    def data_start(self) -> int:
        """Offset of the data in the file."""
        return 8 + len(self.header)

    def read(self, name: str) -> Tensor:
        """One tensor, in a type of `FLOAT_TYPES`."""
        with self.path.open("rb") as file:
            return self.read_from(file, name)

    def read_from(self, file: BinaryIO, name: str) -> Tensor:
        """The same from a file that is open already."""
        stored = self.tensors[name]
        file.seek(self.data_start + stored.start)
        raw = bytearray(file.read(stored.end - stored.start))
        dtype = FLOAT_TYPES[stored.type_name]
        if not raw:
            return torch.empty(stored.shape, dtype=dtype)
        return torch.frombuffer(raw, dtype=dtype).reshape(stored.shape)


def open_shard(path: Path) -> Shard:
    """Read a file's header.

    Raises:
        ExportError: it is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = file.read(length)
        content: dict[str, Any] = json.loads(header)
        metadata = content.pop("__metadata__", None)
        tensors = {
            name: StoredTensor(entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in content.items()
        }
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path.name!r} of the original cannot be read as safetensors") from (
            error
        )
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    return Shard(path, header, ordered, metadata)


def rewritten_bytes(shard: Shard, dtype: torch.dtype | None) -> int:
    """About how large `rewrite` makes the file."""
    return shard.data_start + sum(_size(stored, dtype) for stored in shard.tensors.values())


def rewrite(
    shard: Shard,
    target: Path,
    edits: Mapping[str, TensorEdit],
    dtype: torch.dtype | None = None,
) -> None:
    """Write the file anew with some tensors edited.

    Args:
        shard: the original.
        target: the new file.
        edits: by tensor name; edited tensors keep their stored type unless `dtype` is given.
        dtype: cast every floating-point tensor to this; None: all types stay.

    Raises:
        ExportError: a value does not fit into its type.
        OSError: the file cannot be written.
    """
    header = shard.header if dtype is None else _new_header(shard, dtype)
    with shard.path.open("rb") as source, target.open("wb") as out:
        out.write(struct.pack("<Q", len(header)))
        out.write(header)
        for name, stored in shard.tensors.items():
            edit = edits.get(name)
            wanted = _type_after(stored, dtype)
            if edit is None and wanted == stored.type_name:
                source.seek(shard.data_start + stored.start)
                _copy(source, out, stored.end - stored.start)
                continue
            tensor = shard.read_from(source, name)
            edited = tensor if edit is None else edit(tensor)
            if edited.shape != tensor.shape:
                raise ValueError(f"{name}: {tuple(tensor.shape)} became {tuple(edited.shape)}")
            out.write(raw_bytes(fitted(name, edited, FLOAT_TYPES[wanted])))


def fitted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another type.

    Raises:
        ExportError: a finite value is not finite any more.
    """
    cast = tensor.to(dtype)
    if dtype is torch.float16 and bool((~cast.isfinite() & tensor.isfinite()).any()):
        raise ExportError(
            f"{name!r} holds values too large for float16; save as bfloat16 or float32"
        )
    return cast


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _type_after(stored: StoredTensor, dtype: torch.dtype | None) -> str:
    if dtype is None or stored.type_name not in FLOAT_TYPES:
        return stored.type_name
    return TYPE_NAMES[dtype]


def _size(stored: StoredTensor, dtype: torch.dtype | None) -> int:
    wanted = _type_after(stored, dtype)
    if wanted == stored.type_name:
        return stored.end - stored.start
    old = FLOAT_TYPES[stored.type_name].itemsize
    return (stored.end - stored.start) // old * FLOAT_TYPES[wanted].itemsize


def _new_header(shard: Shard, dtype: torch.dtype) -> bytes:
    content: dict[str, Any] = {}
    if shard.metadata is not None:
        content["__metadata__"] = dict(shard.metadata)
    position = 0
    for name, stored in shard.tensors.items():
        end = position + _size(stored, dtype)
        content[name] = {
            "dtype": _type_after(stored, dtype),
            "shape": list(stored.shape),
            "data_offsets": [position, end],
        }
        position = end
    header = json.dumps(content, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _copy(source: BinaryIO, out: BinaryIO, count: int) -> None:
    while count > 0:
        block = source.read(min(COPY_BYTES, count))
        if not block:
            raise OSError("the original file ended early")
        out.write(block)
        count -= len(block)
