"""The tree of settings: which keys there are, what each takes, the nearest to a wrong one.

Knows the settings only as the pydantic model it is given, and reads no values.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

KeyPath: TypeAlias = tuple[str, ...]
Model: TypeAlias = type[BaseModel]

ENV_PREFIX = "HERETIC_KL_"
ANY_NAME = "NAME"


class Located(NamedTuple):
    """Where a path ends in the tree of settings."""

    kind: Literal["leaf", "table", "open", "unknown"]  # open: below a free-form table
    field: FieldInfo | None  # the last one on the way that is no table
    model: Model | None  # the table's, or the one that lacks the key
    depth: int  # how many segments of the path are known


def same_name(name: str) -> str:
    """Return what two spellings of one scorer's name share."""
    return name.lower().replace("-", "_")


def inner_model(info: FieldInfo) -> tuple[Model | None, bool]:
    """Return the table that a field holds, and whether it holds many of them by name."""
    annotation = info.annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        if isinstance(value, type) and issubclass(value, BaseModel):
            return value, True
    return None, False


def locate(root: Model, path: KeyPath) -> Located:
    """Follow `path` from `root` as far as it is known."""
    model, depth = root, 0
    while depth < len(path):
        info = model.model_fields.get(path[depth])
        if info is None:
            return Located("unknown", None, model, depth)
        depth += 1
        inner, named = inner_model(info)
        if inner is None:
            if depth == len(path):
                return Located("leaf", info, model, depth)
            free = get_origin(info.annotation) is dict
            return Located("open" if free else "unknown", info, model, depth)
        if named and depth == len(path):
            return Located("table", info, None, depth)
        model, depth = inner, depth + named
    return Located("table", None, model, depth)


def leaves(
    root: Model, prefix: KeyPath = (), names: Sequence[str] = (ANY_NAME,)
) -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Yield every setting's path and field; tables by name appear once per name of `names`."""
    for key, info in root.model_fields.items():
        inner, named = inner_model(info)
        if inner is None:
            yield (*prefix, key), info
        elif named:
            for name in names:
                yield from leaves(inner, (*prefix, key, name), names)
        else:
            yield from leaves(inner, (*prefix, key), names)


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
    metadata = getattr(annotation, "__metadata__", None)
    return annotation.__origin__ if metadata is not None else annotation


def is_optional(info: FieldInfo) -> bool:
    """Whether a field may be None."""
    return NoneType in get_args(info.annotation)


def allowed(info: FieldInfo) -> str:
    """Say in words which values a field takes."""
    annotation = without_none(info.annotation)
    if values := choices(info):
        return ("a list of " if get_origin(annotation) is tuple else "one of ") + ", ".join(values)
    if get_origin(annotation) is dict:
        return "a table"
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    text = words.get(annotation, "text, not empty" if _bound(info, "min_length") else "text")
    lowest, above, highest = (_bound(info, name) for name in ("ge", "gt", "le"))
    if lowest is not None:
        return (
            f"{text}, {lowest} or more" if highest is None else f"{text} from {lowest} to {highest}"
        )
    if above is not None:
        return f"{text} above {above}" + (f", at most {highest}" if highest is not None else "")
    return text


def _bound(info: FieldInfo, name: str) -> Any:
    metadata = [*info.metadata]
    for option in (info.annotation, *get_args(info.annotation)):
        metadata += getattr(option, "__metadata__", ())
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
    return ENV_PREFIX + "__".join(path).replace("-", "_").upper()


def nearest_known(
    root: Model, path: KeyPath, spell: Callable[[KeyPath], str], more: Sequence[str] = ()
) -> str | None:
    """Return the known spelling nearest to an unknown path: by last word first, then in all."""
    names = (path[1],) if path[0] == "scorers" and len(path) > 2 else (ANY_NAME,)
    known = [leaf for leaf, _ in leaves(root, names=names)]
    tables = {leaf[:depth] for leaf in known for depth in range(1, len(leaf))}
    candidates = [*known, *sorted(tables)]
    wanted, last = spell(path), same_name(path[-1])
    same_last = [spell(candidate) for candidate in candidates if same_name(candidate[-1]) == last]
    everything = [*(spell(candidate) for candidate in candidates), *more]
    siblings = [spell(c) for c in candidates if len(path) > 1 and c[:-1] == path[:-1]]
    for group, cutoff in ((same_last, 0.0), (siblings, 0.6), (everything, 0.6)):
        if match := difflib.get_close_matches(wanted, group, n=1, cutoff=cutoff):
            return match[0]
    by_last = {same_name(candidate[-1]): spell(candidate) for candidate in reversed(candidates)}
    if match := difflib.get_close_matches(last, by_last, n=1, cutoff=0.7):
        return by_last[match[0]]
    return None
