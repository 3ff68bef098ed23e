"""Events of a command as JSON for programs, one a line, and their schema. Decides no wording."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import IO, Any, get_args

from pydantic import TypeAdapter

from heretic_kl._version import EVENTS_VERSION
from heretic_kl.events import Event


class JsonLinesObserver:
    """Called with every event; writes it as a line of ASCII and flushes. A context manager."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def __enter__(self) -> JsonLinesObserver:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.flush()

    def settle(self) -> None:
        """Nothing moves."""

    def __call__(self, event: Event) -> None:
        """Write one event."""
        self._stream.write(event_line(event) + "\n")
        self._stream.flush()


def event_line(event: Event) -> str:
    """One event as JSON; numbers that are not finite are null."""
    kind = type(event)
    fields = json.loads(_adapters()[kind].dump_json(event))
    return json.dumps({"v": EVENTS_VERSION, "event": _name(kind), **fields}, allow_nan=False)


def event_schema() -> dict[str, Any]:
    """The JSON schema of a line: which events there are, and the fields of each."""
    adapters = _adapters()
    references, shared = TypeAdapter.json_schemas(
        [(kind.__name__, "serialization", adapter) for kind, adapter in adapters.items()]
    )
    definitions = shared["$defs"]
    lines = []
    for kind in adapters:
        reference = references[kind.__name__, "serialization"]["$ref"]
        table = definitions[reference.rpartition("/")[2]]
        constants = {"v": {"const": EVENTS_VERSION}, "event": {"const": _name(kind)}}
        table["properties"] = constants | table.get("properties", {})
        table["required"] = [*constants, *table.get("required", [])]
        lines.append({"$ref": reference})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of `heretic-kl --json`, version {EVENTS_VERSION}",
        "description": "Readers leave out events and fields that they do not know.",
        "oneOf": lines,
        "$defs": _simplified(definitions),
    }


@cache
def _adapters() -> dict[type[Event], TypeAdapter[Any]]:
    return {kind: TypeAdapter(kind) for kind in get_args(Event)}


def _name(kind: type[Event]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


def _simplified(schema: Any) -> Any:
    """Without titles; every number may be null, which is how one that is not finite is written."""
    if isinstance(schema, list):
        return [_simplified(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {
        key: _simplified(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
    }
    if changed.get("type") == "number":
        changed["type"] = ["number", "null"]
    return changed
