"""The results file: a header, then a line an edit, appended as it is measured.

Arrays are float16 in base64: their third digit is beyond what prompts can tell. A line that a
killed process left unfinished is dropped.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heretic_kl.files import write_text


@dataclass(frozen=True)
class Row:
    """One measured edit."""

    edit: str
    family: str
    facts: Mapping[str, Any]
    seconds: float
    """CPU seconds."""
    arrays: Mapping[str, Tensor]
    """Name -> one value a prompt, or more of each."""


@dataclass
class RowsFile:
    """Rows of one model; `open` continues a file."""

    path: Path
    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> RowsFile:
        """What is there.

        Raises:
            SystemExit: the file is missing or begins with no header.
        """
        if not path.exists():
            raise SystemExit(f"{path} is missing: run python -m benchmarks.study_kl_tokens first")
        lines = path.read_text(encoding="utf-8").split("\n")
        whole = lines[:-1]  # what follows the last line break was not finished
        if not whole:
            raise SystemExit(f"{path} has no header: move it away")
        return cls(path, _decoded(json.loads(whole[0])), [_row(line) for line in whole[1:]])

    @classmethod
    def open(cls, path: Path, header: dict[str, Any], equal: tuple[str, ...]) -> RowsFile:
        """Continue a file, or begin one.

        Args:
            path: of the file.
            header: facts of this run.
            equal: names of facts in which an older run must agree.

        Raises:
            SystemExit: an older run measured something else.
        """
        if path.exists() and b"\n" in path.read_bytes():
            before = cls.read(path)
            for name in equal:
                if before.header.get(name) != header[name]:
                    raise SystemExit(f"{path} was measured with another {name}: use another --out")
            text = path.read_text(encoding="utf-8")
            if not text.endswith("\n"):
                write_text(path, text[: text.rindex("\n") + 1])
            return before
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(_encoded(header), ensure_ascii=False) + "\n")
        return cls(path, header)

    def append(self, row: Row) -> None:
        """Add a row, and see that it is on the disk."""
        arrays = {name: _packed(values) for name, values in row.arrays.items()}
        content = {**vars(row), "facts": dict(row.facts), "arrays": arrays}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)


def _packed(values: Tensor) -> dict[str, Any]:
    array = values.double().numpy().astype("<f2")
    return {"shape": list(array.shape), "f2": base64.b64encode(array.tobytes()).decode()}


def _unpacked(content: Mapping[str, Any]) -> Tensor:
    flat = np.frombuffer(base64.b64decode(content["f2"]), dtype="<f2")
    return torch.from_numpy(flat.astype(np.float64)).reshape(content["shape"])


def _row(line: str) -> Row:
    content = json.loads(line)
    arrays = {name: _unpacked(values) for name, values in content.pop("arrays").items()}
    return Row(arrays=arrays, **content)


def _encoded(header: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _packed(v) if isinstance(v, Tensor) else v for k, v in header.items()}


def _decoded(header: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _unpacked(v) if isinstance(v, dict) and "f2" in v else v for k, v in header.items()}
