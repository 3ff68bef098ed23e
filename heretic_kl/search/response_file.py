"""The log of responses beside a study, `STUDY.responses.jsonl`: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from heretic_kl.errors import StudyError
from heretic_kl.search.storage.journal import locked

SUFFIX = ".responses.jsonl"


class ResponseFile:
    """The log of the study of this name, in the folder of studies."""

    def __init__(self, folder: Path | str, name: str) -> None:
        self.path = Path(folder) / f"{name}{SUFFIX}"

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows behind those that are there, all of them or none.

        Processes that share a study take turns. A line that a killed process left unfinished is
        removed. Whatever is not ASCII is escaped, control characters too.

        Raises:
            StudyError: the file cannot be written; it holds whole lines all the same.
        """
        content = "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            with self.path.open("r+b", buffering=0) as file, locked(file, self.path):
                _append(file, content)
        except OSError as error:
            raise StudyError(f"cannot write {str(self.path)!r}: {error.strerror}") from error


def _append(file: BinaryIO, content: bytes) -> None:
    end = file.seek(0, 2)
    if end and (file.seek(end - 1), file.read(1))[1] != b"\n":
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    file.seek(end)
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        file.truncate(end)
        raise
