"""Flags, environment variables and TOML as nested values that remember where they came from.

Checks no values: it finds unknown keys and turns text into something pydantic can check.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_origin

from heretic_kl.config.keys import (
    ENV_PREFIX,
    KeyPath,
    Located,
    Model,
    is_optional,
    locate,
    nearest_known,
    same_name,
    spell_flag,
    spell_key,
    spell_variable,
    without_none,
)
from heretic_kl.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

# Read by other parts of the program; not settings.
OTHER_VARIABLES = frozenset({"HERETIC_KL_CACHE", "HERETIC_KL_DEMO_WHEEL"})
OTHER_FLAGS = ("--config", "--help", "--version")


@dataclass(frozen=True)
class Layer:
    """The values of one source, nested, and where each came from."""

    values: dict[str, Any]
    source: str
    origins: Mapping[KeyPath, str] = field(default_factory=dict)
    config_file: Path | None = None

    def get(self, path: KeyPath) -> Any:
        """Return the value at `path`; `KeyError` where this layer sets nothing there."""
        value: Any = self.values
        for key in path:
            if not isinstance(value, Mapping):
                raise KeyError(key)
            value = value[key]
        return value

    def has(self, path: KeyPath) -> bool:
        """Whether this layer sets anything at `path`."""
        try:
            self.get(path)
        except KeyError:
            return False
        return True

    def origin(self, path: KeyPath) -> str:
        """Return the flag, variable or file that set `path`."""
        above = (path[:depth] for depth in range(len(path), 0, -1))
        below = (key for key in self.origins if key[: len(path)] == path)
        found = (self.origins[key] for key in (*above, *below) if key in self.origins)
        return next(found, self.source)

    def with_scorer_names_of(self, lower: Iterable["Layer"]) -> "Layer":
        """Spell scorer names as lower layers do: flags and variables cannot show case and `_`."""
        names = _scorer_names(lower)

        def spelled(path: KeyPath) -> KeyPath:
            if path[:1] != ("scorers",) or len(path) < 2:
                return path
            return ("scorers", names.get(same_name(path[1]), path[1]), *path[2:])

        values = dict(self.values)
        if isinstance(values.get("scorers"), Mapping):
            renamed: dict[str, Any] = {}
            for name, table in values["scorers"].items():
                _merge(renamed, {spelled(("scorers", name))[1]: table})
            values["scorers"] = renamed
        origins = {spelled(path): origin for path, origin in self.origins.items()}
        return replace(self, values=values, origins=origins)


# --- nested mappings: config files, presets -------------------------------------------------


def mapping_layer(
    values: Mapping[str, Any],
    source: str,
    root: Model | None = None,
    problems: list[str] | None = None,
) -> Layer:
    """Take nested values as they are; with `root`, note unknown keys in `problems`."""
    if root is not None and problems is not None:
        _check_keys(root, values, (), source, problems)
    return Layer(dict(values), source)


def file_layer(root: Model, file: Path, problems: list[str]) -> Layer:
    """Read a TOML file.

    Raises:
        ConfigError: Where there is no such file, or it is no TOML: with its line.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file (--config)") from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}: not UTF-8 text (line {line})") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = f"at line {len(text.splitlines()) or 1}, the last one"
        message = str(error).replace("at end of document", last)
        raise ConfigError(f"{file}: not valid TOML: {message}") from None
    return mapping_layer(values, str(file), root, problems)


def _check_keys(
    root: Model, values: Mapping[str, Any], prefix: KeyPath, source: str, problems: list[str]
) -> None:
    for key, value in values.items():
        path = (*prefix, str(key))
        found = locate(root, path)
        if found.kind == "unknown":
            nearest = nearest_known(root, path, spell_key)
            if nearest and "." not in nearest and prefix:
                nearest = f"{nearest}, above the first [table]"
            hint = _suggestion(nearest, "`heretic-kl config` prints every setting")
            what = "table" if isinstance(value, Mapping) else "setting"
            problems.append(f"unknown {what} {spell_key(path)} ({source}){hint}")
        elif found.kind == "table":
            if isinstance(value, Mapping):
                _check_keys(root, value, path, source, problems)
            else:
                problems.append(f"{spell_key(path)} must be a table, got {value!r} ({source})")


# --- the environment ------------------------------------------------------------------------


def environ_layer(
    root: Model, environ: Mapping[str, str], lower: Sequence[Layer], problems: list[str]
) -> Layer:
    """Read `HERETIC_KL_*`; `__` goes down a table."""
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    for name in sorted(environ):
        upper = name.upper()
        if not upper.startswith(ENV_PREFIX) or upper in OTHER_VARIABLES:
            continue
        path = tuple(upper[len(ENV_PREFIX) :].lower().split("__"))
        found = locate(root, path)
        if found.kind == "unknown" or not all(path):
            nearest = nearest_known(root, path, spell_variable, sorted(OTHER_VARIABLES))
            hint = _suggestion(nearest, "`heretic-kl --help` lists every setting")
            problems.append(f"unknown environment variable {name}{hint}")
            continue
        _put(root, found, path, environ[name], name, values, origins, problems)
    return Layer(values, "the environment", origins).with_scorer_names_of(lower)


# --- the command line -----------------------------------------------------------------------


def argv_layer(root: Model, argv: Sequence[str], problems: list[str]) -> Layer:
    """Read flags: `--kl-tokens 3`, `--edit.norm=row`, `--no-quiet`, `--config FILE`."""
    values: dict[str, Any] = {}
    origins: dict[KeyPath, str] = {}
    config_file: Path | None = None
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            problems.append(_not_a_flag(word))
            continue
        flag, equals, text = word.partition("=")
        path, found, negated = _flag_path(root, flag)
        if flag != "--config" and found.kind == "unknown":
            nearest = nearest_known(root, path, spell_flag, OTHER_FLAGS)
            hint = _suggestion(nearest, "`heretic-kl --help` lists every setting")
            problems.append(f"unknown flag {flag}{hint}")
            if not equals and words and not words[0].startswith("-"):
                words.pop(0)
            continue
        value = text if equals else None
        if value is None and _is_switch(found):
            spelled = not negated and bool(words) and words[0].lower() in ("true", "false")
            value = words.pop(0) if spelled else ("false" if negated else "true")
        elif negated:
            problems.append(f"{flag} takes no value")
            continue
        elif value is None and words and not words[0].startswith("--"):
            value = words.pop(0)
        if value is None:
            problems.append(f"{flag} needs a value ({flag}=VALUE for one that begins with --)")
        elif flag == "--config":
            config_file = Path(value).expanduser()
        else:
            _put(root, found, path, value, flag, values, origins, problems)
    return Layer(values, "the command line", origins, config_file)


def _flag_path(root: Model, flag: str) -> tuple[KeyPath, Located, bool]:
    """Return a flag's path, where it leads, and whether it is the `--no-` form of a switch."""

    def path_of(name: str) -> KeyPath:
        parts = name.split(".")
        named = parts[0] == "scorers"
        # A scorer's name is kept as typed; lower layers may know it by another spelling.
        return tuple(p if named and i == 1 else p.replace("-", "_") for i, p in enumerate(parts))

    path = path_of(flag[2:])
    found = locate(root, path)
    if found.kind == "unknown" and flag.startswith("--no-"):
        positive = path_of(flag[5:])
        switch = locate(root, positive)
        if _is_switch(switch):
            return positive, switch, True
    return path, found, False


def _is_switch(found: Located) -> bool:
    return (
        found.kind == "leaf"
        and found.field is not None
        and without_none(found.field.annotation) is bool
    )


def _suggestion(nearest: str | None, otherwise: str) -> str:
    return f"; did you mean {nearest}?" if nearest else f"; {otherwise}"


def _not_a_flag(word: str) -> str:
    if word.startswith("-"):
        return f"unknown flag {word}; flags begin with two dashes, `heretic-kl --help` lists them"
    return f"unexpected argument {word!r}; a model is given as --model {word}"


# --- text to values -------------------------------------------------------------------------


def _put(
    root: Model,
    found: Located,
    path: KeyPath,
    text: str,
    origin: str,
    values: dict[str, Any],
    origins: dict[KeyPath, str],
    problems: list[str],
) -> None:
    """Parse `text` for the place `found` and merge it into `values`."""
    try:
        value = _parse(found, text)
    except ValueError as error:
        problems.append(f"{spell_key(path)} must be {error}, got {text!r} ({origin})")
        return
    if found.kind == "table":
        _check_keys(root, value, path, origin, problems)
    previous = _lookup(values, path)
    if isinstance(previous, list) and isinstance(value, list) and found.kind == "leaf":
        value = [*previous, *value]
    nested: Any = value
    for key in reversed(path):
        nested = {key: nested}
    _merge(values, nested)
    origins[path] = origin


def _parse(found: Located, text: str) -> Any:
    """Turn text into what pydantic can check; `ValueError` says what was expected."""
    if found.kind == "table":
        return _json_table(text)
    if found.kind == "open":
        return _json_or_text(text)
    assert found.field is not None
    if text == "null" and is_optional(found.field):
        return None
    kind = get_origin(without_none(found.field.annotation))
    if kind is dict:
        return _json_table(text)
    if kind is tuple:
        if not text.lstrip().startswith("["):
            return [part.strip() for part in text.split(",") if part.strip()]
        value = _json_or_text(text)
        return value
    return text


def _json_table(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError("a table, as a JSON object")
    return value


def _json_or_text(text: str) -> Any:
    """Read JSON; plain words are text, but a broken list or object is an error."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except ValueError:
        if text.lstrip()[:1] in ("[", "{"):
            raise ValueError("valid JSON") from None
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def _lookup(values: Mapping[str, Any], path: KeyPath) -> Any:
    value: Any = values
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(into.get(key), dict) and isinstance(value, Mapping):
            _merge(into[key], value)
        else:
            into[key] = value


def _scorer_names(layers: Iterable[Layer]) -> dict[str, str]:
    names: dict[str, str] = {}
    for layer in layers:
        tables = layer.values.get("scorers")
        for name in tables if isinstance(tables, Mapping) else ():
            names[same_name(name)] = name
    return names
