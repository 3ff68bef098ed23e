"""The values of one source, and what is wrong with its keys. Reads no source."""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, get_origin

from heretic_kl.config.keys import KeyPath, Model, locate, nearest_known, spell_key
from heretic_kl.config.retired import new_name
from heretic_kl.config.settings import Settings

NULL: Final = "null"
"""How flags and variables write None."""


class Layer(NamedTuple):
    """The values of one source, nested."""

    values: Mapping[str, Any]
    source: str
    names: Mapping[KeyPath, str] = {}
    """The flag or variable that set a key."""

    def find(self, path: KeyPath) -> tuple[Any, str] | None:
        """Return the value at `path` and who set it; None where this layer sets nothing there."""
        value: Any = self.values
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                return None
            value = value[key]
        above = (path[:depth] for depth in range(len(path), 0, -1))
        below = (name for name in self.names if name[: len(path)] == path)
        names = (self.names[key] for key in (*above, *below) if key in self.names)
        return value, next(names, self.source)


def checked(layer: Layer, problems: list[str], path: KeyPath = ()) -> Layer:
    """Return a layer; note the unknown keys of a nested layer, below `path`."""
    table, _ = layer.find(path) or ({}, "")
    for key, value in table.items():
        here = (*path, str(key))
        place = locate(Settings, here)
        _, source = layer.find(here) or (None, layer.source)
        hint = retired(here, spell_key)
        if hint or place.kind == "unknown":
            what = "table" if isinstance(value, Mapping) else "setting"
            nearest = nearest_known(Settings, here, spell_key)
            if nearest and "." not in nearest and path:
                nearest = f"{nearest}, above the first [table]"
            hint = hint or did_you_mean(nearest, "`heretic-kl config` prints every setting")
            problems.append(f"unknown {what} {spell_key(here)} ({source}); {hint}")
        elif isinstance(value, Mapping) and (place.kind != "leaf" or here[-1] == "settings"):
            checked(layer, problems, here)
        elif place.kind == "table":
            shown = repr_short(value)
            problems.append(f"{spell_key(here)} must be a table, got {shown} ({source})")
    return layer


def tables_are_json(
    texts: Mapping[KeyPath, Any], names: Mapping[KeyPath, str], problems: list[str]
) -> bool:
    """Note where a whole table is given that is no JSON object, or has unknown keys."""
    count = len(problems)
    uses = ((path, text) for path, value in texts.items() for text in _each_use(value))
    for path, text in uses:
        place = locate(Settings, path)
        free = place.field is not None and get_origin(place.field.annotation) is dict
        if (place.kind == "table" or (free and place.kind == "leaf")) and isinstance(text, str):
            value = _json(text)
            if isinstance(value, dict):
                nested: Any = value
                for key in reversed(path):
                    nested = {key: nested}
                checked(Layer(nested, names[path]), problems, path)
            else:
                problems.append(
                    f"{spell_key(path)} must be a table, as a JSON object, got {repr_short(text)} "
                    f"({names[path]})"
                )
    return len(problems) == count


def _each_use(value: Any) -> list[Any]:
    """The library keeps every use of a flag for a table."""
    return value if isinstance(value, list) else [value]


def decoded(layer: Layer, texts: Mapping[KeyPath, Any], problems: list[str]) -> Layer:
    """Read scorers' own settings, which pydantic-settings leaves as text, as JSON or text."""
    for path, text in texts.items():
        if locate(Settings, path).kind != "open" or not isinstance(text, str):
            continue
        value = _json(text)
        if value is None and text != NULL:
            if text.lstrip()[:1] in ("[", "{"):
                problems.append(
                    f"{spell_key(path)} must be valid JSON, got {repr_short(text)} "
                    f"({layer.names[path]})"
                )
            value = text
        table, _ = layer.find(path[:-1]) or ({}, "")
        table[path[-1]] = value
    return layer


def _json(text: str) -> Any:
    """Return the value of JSON text; None where it is none."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None


def repr_short(value: Any) -> str:
    """A value as it is shown in an error: the middle of a long one is left out."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-20:]}"


def did_you_mean(nearest: str | None, otherwise: str) -> str:
    """Name the nearest known spelling, or where all of them are listed."""
    return f"did you mean {nearest}?" if nearest else otherwise


def retired(path: KeyPath, spell: Callable[[KeyPath], str], kind: Model = Settings) -> str | None:
    """Say what became of a key that there was, where it is no key of today."""
    name = new_name(spell_key(path))
    if name is None or locate(kind, path).kind in ("leaf", "table"):
        return None
    path = tuple(name.split("."))
    if not name:
        return "it was removed"
    return None if locate(kind, path).kind == "unknown" else f"it is now {spell(path)}"
