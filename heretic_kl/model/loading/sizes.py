"""What a model takes on disk and in memory, from the headers of its files. Loads no weights."""

from __future__ import annotations

import glob
import json
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

from heretic_kl.model.loading.source import ModelSource, hub_arguments
from heretic_kl.model.transformers_logging import quiet_transformers

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Of types that store one weight a number; others are packed, several weights to a number."""
_SHARD = re.compile(r"-\d{5}(-of-\d{5}\.gguf)$", re.IGNORECASE)


class StoredSize(NamedTuple):
    """What a model takes on disk."""

    file_bytes: int
    bits_per_weight: float | None
    """Over all tensors, scales included; None: how many weights there are is not known."""


class StoredWeights(NamedTuple):
    """What files hold."""

    weights: int | None
    """None: some are packed in a way that does not show how many there are."""
    tensor_bytes: int


def stored_size(name: str) -> StoredSize | None:
    """Measure a GGUF file, all of a split one, or a folder's safetensors; None: neither is here."""
    source = ModelSource(name)
    if source.gguf_file is not None and source.gguf_file.is_file():
        files, stored = gguf_shards(source.gguf_file), gguf_weights(source.gguf_file)
    elif source.folder is not None and (files := _safetensors(source.folder)):
        parts = [_weights(file) for file in files]
        counts = [part.weights for part in parts if part.weights is not None]
        count = sum(counts) if len(counts) == len(parts) else _count_of_config(source)
        stored = StoredWeights(count, sum(part.tensor_bytes for part in parts))
    else:
        return None
    size = sum(file.stat().st_size for file in files)
    if source.adapter is not None or not stored.weights:
        return StoredSize(size, None)
    return StoredSize(size, 8.0 * stored.tensor_bytes / stored.weights)


def gguf_shards(file: Path) -> list[Path]:
    """All files of a split GGUF model, of which one is named; the file itself if it is whole."""
    match = _SHARD.search(file.name)
    if match is None:
        return [file]
    stem, ending = file.name[: match.start()], match[1]
    parts = file.parent.glob(f"{glob.escape(stem)}-*{ending}")
    return sorted(path for path in parts if len(path.name) == len(file.name))


def gguf_weights(file: Path) -> StoredWeights:
    """What a GGUF model holds, all of a split one."""
    import gguf

    tensors = [tensor for part in gguf_shards(file) for tensor in gguf.GGUFReader(part).tensors]
    count = sum(int(tensor.n_elements) for tensor in tensors)
    return StoredWeights(count, sum(int(tensor.n_bytes) for tensor in tensors))


def _safetensors(folder: Path) -> list[Path]:
    """The files of the model: those that its index names, or all."""
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return files
    return [file for file in files if file.name in names] or files


def _weights(path: Path) -> StoredWeights:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    count: int | None = 0
    stored = 0
    for tensor in header.values():
        start, stop = tensor["data_offsets"]
        stored += stop - start
        width = _BYTES.get(tensor["dtype"])
        count = None if width is None or count is None else count + (stop - start) // width
    return StoredWeights(count, stored)


def _count_of_config(source: ModelSource) -> int | None:
    """How many weights a model of this configuration has; None: it cannot be built without code."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    name, extra = hub_arguments(source)
    auto_class: Any = AutoModelForCausalLM
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **extra)
            model = auto_class.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, AttributeError, TypeError):
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters())
