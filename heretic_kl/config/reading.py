"""Settings from the command line, the environment, a TOML file and a preset, in this order.

pydantic-settings parses and merges; here are unknown keys, and errors that name the source.
"""

import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_settings import EnvSettingsSource

from heretic_kl.config.flag_parser import read_flags
from heretic_kl.config.keys import (
    ENV_PREFIX,
    KeyPath,
    allowed,
    choices,
    locate,
    nearest_known,
    spell_key,
    spell_variable,
)
from heretic_kl.config.layers import (
    NULL,
    Layer,
    checked,
    decoded,
    did_you_mean,
    repr_short,
    retired,
    tables_are_json,
)
from heretic_kl.config.retired import RETIRED_VALUES
from heretic_kl.config.settings import CommonSettings, ProgramSettings, Settings, settings_from
from heretic_kl.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

DEFAULT_CONFIG_FILE = Path("config.toml")
OTHER_VARIABLES = ("HERETIC_KL_CACHE", "HERETIC_KL_DEMO_WHEEL")  # read elsewhere; no settings

LARGEST_FILE = 1 << 20  # bytes
_DEEP_KEY = re.compile(r"(?:[\w\"'-]{1,99}[ \t]*\.[ \t]*){33}")
"""A dotted key on which a TOML parser spends time that grows with the square of its length."""

SettingsT = TypeVar("SettingsT", bound=ProgramSettings)


def load_settings(
    argv: Sequence[str] = (), *, defaults: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings of a search; see `read_settings`."""
    return read_settings(Settings, argv, defaults)


def read_settings(
    kind: type[SettingsT],
    argv: Sequence[str],
    preset: Mapping[str, Any] | None = None,
    *,
    stored: Mapping[str, Any] | None = None,
) -> SettingsT:
    """Read settings: command line > environment > config file > preset > code defaults.

    Args:
        kind: of which command. What it does not share with the others it takes from the command
            line alone; the settings of a search come from everywhere.
        argv: flags without the program's name and command; `--config FILE` names the file,
            without it `config.toml` in the current folder is read where there is one.
        preset: values below the config file, nested as in the file.
        stored: all settings of an earlier run, in place of environment, file and preset.

    Raises:
        ConfigError: with one line for each key or value that is wrong, and where it came from.
    """
    problems: list[str] = []
    flags, file = read_flags(kind, argv, problems)
    if stored is not None:
        if file is not None:
            raise ConfigError(f"--config {file} has no effect: the study has settings of its own")
        layers, preset = [flags, Layer(stored, "the study")], None
    else:
        layers = [flags, _environment(kind, problems)]
        if file is None and DEFAULT_CONFIG_FILE.exists():
            file = DEFAULT_CONFIG_FILE
    if file is not None:
        layers.append(checked(Layer(_toml(file), str(file)), problems))
    if preset is not None:
        layers.append(checked(Layer(preset, "the preset"), problems))
    if problems:
        raise ConfigError("\n".join(problems))
    if not issubclass(kind, Settings):
        layers[1:] = [
            layer._replace(values={k: v for k, v in layer.values.items() if _shares(kind, k)})
            for layer in layers[1:]
        ]
    try:
        with settings_from(*(layer.values for layer in layers)):
            return kind()
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(kind, error, layers))) from None


def _shares(kind: type[ProgramSettings], key: str) -> bool:
    """Whether a command takes a setting of a search from the environment and files."""
    return key in kind.model_fields and (
        key in CommonSettings.model_fields or key in kind.everywhere
    )


# --- files ----------------------------------------------------------------------------------


def _toml(path: Path) -> dict[str, Any]:
    """Return the values of a file; an error says in one line what is wrong with it."""
    try:
        with path.open("rb") as file:  # a pipe too, as `--config <(...)` makes one
            content = file.read(LARGEST_FILE + 1)
        text = content.decode("utf-8-sig")
        if len(content) > LARGEST_FILE or _DEEP_KEY.search(text):
            raise RecursionError
        values: dict[str, Any] = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file (--config)") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: too large (over 1 MB) or too deeply nested") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}: not UTF-8 text (line {line})") from None
    except tomllib.TOMLDecodeError as error:
        last = f"at line {len(text.splitlines()) or 1}, the last one"
        message = str(error).replace("at end of document", last)
        raise ConfigError(f"{path}: not valid TOML: {message}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path}: cannot be read: {str(error).partition(';')[0]}") from None
    return values


# --- the environment ------------------------------------------------------------------------


def _environment(kind: type[ProgramSettings], problems: list[str]) -> Layer:
    names: dict[KeyPath, str] = {}
    for name in sorted(os.environ):
        if not name.upper().startswith(ENV_PREFIX) or name.upper() in OTHER_VARIABLES:
            continue
        path = tuple(name[len(ENV_PREFIX) :].lower().split("__"))
        hint = retired(path, spell_variable)
        if hint or locate(Settings, path).kind == "unknown" or not all(path):
            nearest = nearest_known(Settings, path, spell_variable, OTHER_VARIABLES)
            hint = hint or did_you_mean(nearest, "`heretic-kl --help-all` lists every setting")
            problems.append(f"unknown environment variable {name}; {hint}")
        elif issubclass(kind, Settings) or _shares(kind, path[0]):
            names[path] = name
    texts = {path: os.environ[name] for path, name in names.items()}
    if not tables_are_json(texts, names, problems):
        return Layer({}, "the environment")
    source = EnvSettingsSource(
        kind,
        case_sensitive=False,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str=NULL,
    )
    return decoded(Layer(source(), "the environment", names), texts, problems)


# --- what is said ---------------------------------------------------------------------------


def _explained(
    kind: type[ProgramSettings], error: ValidationError, layers: Sequence[Layer]
) -> list[str]:
    """One line per wrong setting: its name, what is allowed, its value, its source."""
    lines: dict[KeyPath, str] = {}
    for detail in error.errors(include_url=False):
        location = tuple(str(part) for part in detail["loc"])
        place = locate(kind, location)
        path = location[: place.depth]
        settings = (layer.find(path) for layer in layers)
        value, source = next(filter(None, settings), (detail["input"], "the defaults"))
        if detail["type"] == "whole_line":
            lines.setdefault(path, f"{detail['msg']} ({source})")
            continue
        expected = allowed(place.field) if place.field is not None else "a table"
        if detail["type"] == "expected":
            expected = detail["msg"]
        elif detail["type"] in ("string_unicode", "string_pattern_mismatch"):
            expected = "Unicode text without control characters"
        shown = str(value).lower() if isinstance(value, bool) else repr_short(value)
        wrong_choice = place.field is not None and detail["type"] == "literal_error"
        hint = _nearest_value(value, choices(place.field)) if wrong_choice and place.field else ""
        lines.setdefault(
            path, f"{spell_key(path)} must be {expected}, got {shown} ({source}){hint}"
        )
    return list(lines.values())


def _nearest_value(value: Any, values: Sequence[str]) -> str:
    if RETIRED_VALUES.get(str(value)) in values:
        return f"; {value} is now {RETIRED_VALUES[value]}"
    nearest = difflib.get_close_matches(str(value), values, n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""
