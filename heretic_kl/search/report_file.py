"""What a study itself does not hold of its run, as JSON beside it: `STUDY.report.json`.

Model, machine, separation of the directions, prompts, responses. Measures and draws nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from heretic_kl import files
from heretic_kl.errors import StudyError
from heretic_kl.ranks import is_first
from heretic_kl.search.storage.journal import lock_file

SUFFIX = ".report.json"
FORMAT = 1


class RunFile:
    """The file of the study of this name, in the folder of studies."""

    def __init__(self, folder: Path | str, name: str) -> None:
        self.path = Path(folder) / f"{name}{SUFFIX}"

    def read(self) -> dict[str, Any]:
        """What it holds; {} where there is none.

        Raises:
            StudyError: it cannot be read, or is of another format.
        """
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not valid JSON"
            raise StudyError(f"cannot read {str(self.path)!r}: {reason}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StudyError(
                f"{str(self.path)!r} has another format than this version reads ({FORMAT}): "
                "move it away, or use the version that wrote it"
            )
        return content

    def update(self, entries: Mapping[str, Any]) -> None:
        """Put entries into the file; a table is merged with the table that is there.

        Processes that share a study take turns.

        Args:
            entries: JSON-ready, tensors' numbers as floats; NaN and infinity become null.

        Raises:
            StudyError: the file cannot be read or written.
        """
        if not is_first():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with lock_file(self.path):
                content = _merged(self.read(), entries)
                text = json.dumps(_finite(content), separators=(",", ":"), allow_nan=False)
                files.write_text(self.path, text + "\n")
        except OSError as error:
            raise StudyError(f"cannot write {str(self.path)!r}: {error.strerror}") from error


def _merged(content: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**content, "format": FORMAT}
    for key, value in entries.items():
        before = merged.get(key)
        merges = isinstance(before, dict) and isinstance(value, Mapping)
        merged[key] = {**before, **value} if merges and before else value
    return merged


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
