"""Tensors and facts in one safetensors file, written whole or not at all.

Knows nothing about what the tensors mean. safetensors is imported only when a file is touched.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from heretic_kl.errors import MeasurementError
from heretic_kl.files import new_file
from heretic_kl.kl.terms import METRIC_VERSION


def save_tensors(
    path: str | Path, kind: str, tensors: Mapping[str, Tensor], facts: Mapping[str, object]
) -> None:
    """Write `tensors` and the JSON-ready `facts` to `path`, replacing it in one step.

    A crash halfway leaves what was there before. `kind` tells `load_tensors` the files apart.
    """
    from safetensors.torch import save_file

    metadata = {
        "kind": kind,
        "metric_version": str(METRIC_VERSION),
        "facts": json.dumps(dict(facts), sort_keys=True),
    }
    with new_file(Path(path)) as partial:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, partial, metadata)


def load_tensors(
    path: str | Path, kind: str, group: str = ""
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors (on the CPU, memory-mapped where possible) and facts of a file.

    A tensor `GROUP.NAME` is read with its group alone, as `NAME`.

    Raises:
        MeasurementError: There is no such file, it is not of this `kind`, or another metric
            version wrote it.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(path)
    if not source.is_file():
        raise MeasurementError(f"there is no {kind} file at {source}")
    try:
        with safe_open(source, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            if metadata.get("kind") != kind:
                raise MeasurementError(
                    f"{source} is not a {kind} file, but {metadata.get('kind', 'something else')}"
                )
            version = metadata.get("metric_version")
            if version != str(METRIC_VERSION):
                raise MeasurementError(
                    f"{source} was written by metric version {version}, "
                    f"this is version {METRIC_VERSION}: compute it again"
                )
            tensors: dict[str, Tensor] = {}
            for name in opened.keys():
                of, _, short = name.rpartition(".")
                if of == group:
                    tensors[short] = opened.get_tensor(name)
            facts: dict[str, object] = json.loads(metadata["facts"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise MeasurementError(f"{source} cannot be read: {error}") from error
    return tensors, facts
