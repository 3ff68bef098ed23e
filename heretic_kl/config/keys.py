"""The tree of settings: which keys there are, what each takes, the nearest to a wrong one.

Knows the settings only as the pydantic model it is given, and reads no values.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

KeyPath: TypeAlias = tuple[str, ...]
Model: TypeAlias = type[Any]  # a pydantic model or a pydantic dataclass

ENV_PREFIX = "HERETIC_KL_"
ANY_NAME = "NAME"


class Located(NamedTuple):
    """Where a path ends in the tree of settings."""

    kind: Literal["leaf", "table", "open", "unknown"]  # open: below a free-form table
    field: FieldInfo | None  # the last one on the way that is no table
    model: Model | None  # the table's, or the one that lacks the key
    depth: int  # how many segments of the path are known


def fields_of(model: Model) -> Mapping[str, FieldInfo]:
    """Return a table's fields by name."""
    fields: Mapping[str, FieldInfo] = model.__pydantic_fields__
    return fields


def inner_model(info: FieldInfo) -> tuple[Model | None, bool]:
    """Return the table that a field holds, and whether it holds many of them by name."""
    annotation, by_name = info.annotation, get_origin(info.annotation) is dict
    if by_name:
        annotation = get_args(annotation)[1]
    if isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or is_dataclass(annotation)
    ):
        return annotation, by_name
    return None, False


def locate(root: Model, path: KeyPath) -> Located:
    """Follow `path` from `root` as far as it is known."""
    model, depth = root, 0
    while depth < len(path):
        info = fields_of(model).get(path[depth])
        if info is None:
            return Located("unknown", None, model, depth)
        depth += 1
        inner, by_name = inner_model(info)
        if inner is None:
            if depth == len(path):
                return Located("leaf", info, model, depth)
            free = get_origin(info.annotation) is dict
            return Located("open" if free else "unknown", info, model, depth)
        if by_name and depth == len(path):
            return Located("table", info, None, depth)
        model, depth = inner, depth + by_name
    return Located("table", None, model, depth)


def leaves(root: Model, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Yield every setting's path and field; in tables by name the name is `NAME`."""
    for key, info in fields_of(root).items():
        inner, by_name = inner_model(info)
        if inner is None:
            yield (*prefix, key), info
        else:
            yield from leaves(inner, (*prefix, key, *((ANY_NAME,) if by_name else ())))


def choices(info: FieldInfo) -> tuple[str, ...]:
    """Return the values of a `Literal` field, or of the elements of a list of them."""
    annotation = without_none(info.annotation)
    if get_origin(annotation) is tuple:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def without_none(annotation: Any) -> Any:
    """Return the one other type of an optional one, without its `Annotated` metadata."""
    options = [option for option in get_args(annotation) if option is not NoneType]
    if len(options) == 1 and NoneType in get_args(annotation):
        annotation = options[0]
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def allowed(info: FieldInfo) -> str:
    """Say in words which values a field takes."""
    annotation = without_none(info.annotation)
    if values := choices(info):
        return ("a list of " if get_origin(annotation) is tuple else "one of ") + ", ".join(values)
    if get_origin(annotation) is tuple:
        return "a list of text, none of it empty"
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    text = words.get(annotation, "text, not empty" if _bound(info, "min_length") else "text")
    lowest, above, highest = (_bound(info, name) for name in ("ge", "gt", "le"))
    if lowest is not None:
        return (
            f"{text}, {lowest} or more" if highest is None else f"{text} from {lowest} to {highest}"
        )
    if above is not None:
        return f"{text} above {above}" + (f", at most {highest}" if highest is not None else "")
    return "a table" if get_origin(annotation) is dict else text


def _bound(info: FieldInfo, name: str) -> Any:
    metadata = [*info.metadata]
    for option in (info.annotation, *get_args(info.annotation)):
        for item in getattr(option, "__metadata__", ()):
            metadata += [item, *getattr(item, "metadata", ())]
    return next((v for item in metadata if (v := getattr(item, name, None)) is not None), None)


# --- names and the nearest known one --------------------------------------------------------


def spell_key(path: KeyPath) -> str:
    """Write a path as in TOML: `edit.norm`."""
    return ".".join(path)


def spell_flag(path: KeyPath) -> str:
    """Write a path as a flag: `--edit.norm`."""
    return "--" + ".".join(path).replace("_", "-")


def spell_variable(path: KeyPath) -> str:
    """Write a path as an environment variable: `HERETIC_KL_EDIT__NORM`."""
    return ENV_PREFIX + "__".join(path).upper()


def nearest_known(
    root: Model, path: KeyPath, spell: Callable[[KeyPath], str], more: Sequence[str] = ()
) -> str | None:
    """Return the known spelling nearest to an unknown path: by last word first, then in all."""
    name = path[1] if path[0] == "scorers" and len(path) > 2 else ANY_NAME
    settings = [tuple(name if p == ANY_NAME else p for p in leaf) for leaf, _ in leaves(root)]
    tables = {leaf[:depth] for leaf in settings for depth in range(1, len(leaf))}
    candidates = [*settings, *sorted(tables)]
    wanted = spell(path)
    same_last = [spell(c) for c in candidates if c[-1] == path[-1]]
    siblings = [spell(c) for c in candidates if len(path) > 1 and c[:-1] == path[:-1]]
    everything = [*map(spell, candidates), *more]
    for group, cutoff in ((same_last, 0.0), (siblings, 0.6), (everything, 0.6)):
        if match := difflib.get_close_matches(wanted, group, n=1, cutoff=cutoff):
            return match[0]
    by_last = {candidate[-1]: spell(candidate) for candidate in reversed(candidates)}
    match = difflib.get_close_matches(path[-1], by_last, n=1, cutoff=0.7)
    return by_last[match[0]] if match else None
