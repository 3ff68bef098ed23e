"""Settings from the command line, the environment, a TOML file and a preset, in this order.

pydantic-settings parses and merges; here are unknown keys, and errors that name the source.
"""

import difflib
import json
import os
import sys
from argparse import SUPPRESS, Action, ArgumentParser, BooleanOptionalAction
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar, get_origin

from pydantic import ValidationError
from pydantic_settings import CliSettingsSource, EnvSettingsSource, TomlConfigSettingsSource

from heretic_kl.config.keys import (
    ENV_PREFIX,
    KeyPath,
    Model,
    allowed,
    choices,
    fields_of,
    locate,
    nearest_known,
    spell_flag,
    spell_key,
    spell_variable,
    without_none,
)
from heretic_kl.config.retired import RETIRED_VALUES, new_name
from heretic_kl.config.settings import CommonSettings, Settings, settings_from
from heretic_kl.errors import ConfigError
from heretic_kl.prompts.source import PromptSource

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

DEFAULT_CONFIG_FILE = Path("config.toml")
OTHER_VARIABLES = ("HERETIC_KL_CACHE", "HERETIC_KL_DEMO_WHEEL")  # read elsewhere; no settings
OTHER_FLAGS = ("--config", "--help", "--help-all", "--version")
NULL = "null"

SettingsT = TypeVar("SettingsT", bound=CommonSettings)


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


def load_settings(
    argv: Sequence[str] = (), *, defaults: Mapping[str, Any] | None = None
) -> Settings:
    """Read the settings of a search; see `read_settings`."""
    return read_settings(Settings, argv, defaults)


def read_settings(
    kind: type[SettingsT], argv: Sequence[str], preset: Mapping[str, Any] | None = None
) -> SettingsT:
    """Read settings: command line > environment > config file > preset > code defaults.

    Args:
        kind: of which command. What it does not share with the others it takes from the command
            line alone; the settings of a search come from everywhere.
        argv: flags without the program's name and command; `--config FILE` names the file,
            without it `config.toml` in the current folder is read where there is one.
        preset: values below the config file, nested as in the file.

    Raises:
        ConfigError: with one line for each key or value that is wrong, and where it came from.
    """
    problems: list[str] = []
    flags, file = _flags(kind, argv, problems)
    layers = [flags, _environment(kind, problems)]
    if file is None and DEFAULT_CONFIG_FILE.exists():
        file = DEFAULT_CONFIG_FILE
    if file is not None:
        layers.append(_checked(Layer(_Toml(kind, file)(), str(file)), problems))
    if preset is not None:
        layers.append(_checked(Layer(preset, "the preset"), problems))
    if problems:
        raise ConfigError("\n".join(problems))
    if not issubclass(kind, Settings):
        shared = CommonSettings.model_fields
        layers[1:] = [
            layer._replace(values={k: v for k, v in layer.values.items() if k in shared})
            for layer in layers[1:]
        ]
    try:
        with settings_from(*(layer.values for layer in layers)):
            return kind()
    except ValidationError as error:
        raise ConfigError("\n".join(_explained(kind, error, layers))) from None


# --- files ----------------------------------------------------------------------------------


class _Toml(TomlConfigSettingsSource):
    """Says in one line what is wrong with a file, and takes a byte order mark."""

    def __init__(self, kind: type[CommonSettings], file: Path) -> None:
        if not file.exists():
            raise ConfigError(f"{file}: no such config file (--config)")
        self._values = self._read_file(file)
        super().__init__(kind, toml_file=None)

    def __call__(self) -> dict[str, Any]:
        return self._values

    def _read_file(self, path: Any) -> dict[str, Any]:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ConfigError(f"{path}: not UTF-8 text (line {line})") from None
        try:
            values: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            last = f"at line {len(text.splitlines()) or 1}, the last one"
            message = str(error).replace("at end of document", last)
            raise ConfigError(f"{path}: not valid TOML: {message}") from None
        return values


def _checked(layer: Layer, problems: list[str], path: KeyPath = ()) -> Layer:
    """Note the unknown keys of a nested layer, below `path`."""
    table, _ = layer.find(path) or ({}, "")
    for key, value in table.items():
        here = (*path, str(key))
        place = locate(Settings, here)
        _, source = layer.find(here) or (None, layer.source)
        hint = _retired(here, spell_key)
        if hint or place.kind == "unknown":
            what = "table" if isinstance(value, Mapping) else "setting"
            nearest = nearest_known(Settings, here, spell_key)
            if nearest and "." not in nearest and path:
                nearest = f"{nearest}, above the first [table]"
            hint = hint or _did_you_mean(nearest, "`heretic-kl config` prints every setting")
            problems.append(f"unknown {what} {spell_key(here)} ({source}); {hint}")
        elif isinstance(value, Mapping) and (place.kind != "leaf" or here[-1] == "settings"):
            _checked(layer, problems, here)
        elif place.kind == "table":
            problems.append(f"{spell_key(here)} must be a table, got {value!r} ({source})")
    return layer


# --- the environment ------------------------------------------------------------------------


def _environment(kind: type[CommonSettings], problems: list[str]) -> Layer:
    names: dict[KeyPath, str] = {}
    for name in sorted(os.environ):
        if not name.upper().startswith(ENV_PREFIX) or name.upper() in OTHER_VARIABLES:
            continue
        path = tuple(name[len(ENV_PREFIX) :].lower().split("__"))
        hint = _retired(path, spell_variable)
        if hint or locate(Settings, path).kind == "unknown" or not all(path):
            nearest = nearest_known(Settings, path, spell_variable, OTHER_VARIABLES)
            hint = hint or _did_you_mean(nearest, "`heretic-kl --help-all` lists every setting")
            problems.append(f"unknown environment variable {name}; {hint}")
        elif issubclass(kind, Settings) or path[0] in CommonSettings.model_fields:
            names[path] = name
    texts = {path: os.environ[name] for path, name in names.items()}
    if not _tables_are_json(texts, names, problems):
        return Layer({}, "the environment")
    source = EnvSettingsSource(
        kind,
        case_sensitive=False,
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str=NULL,
    )
    return _decoded(Layer(source(), "the environment", names), texts, problems)


# --- the command line -----------------------------------------------------------------------


class _Parser(ArgumentParser):
    """Says what is wrong in one line, by raising."""

    def error(self, message: str) -> NoReturn:
        argument, _, problem = message.removeprefix("argument ").partition(": ")
        flag = argument.split("/")[0]
        if problem.startswith("expected"):
            raise ConfigError(f"{flag} needs a value ({flag}=VALUE for one that begins with -)")
        raise ConfigError(message)


def _flags(
    kind: type[CommonSettings], argv: Sequence[str], problems: list[str]
) -> tuple[Layer, Path | None]:
    """Read the flags; return them and the file that `--config` names."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", dest=":config", default=None)
    source: Any = CliSettingsSource(
        kind,
        root_parser=parser,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_parse_none_str=NULL,
        cli_shortcuts={
            name.replace("_", "-"): [str(extra["short"])]
            for name, info in kind.model_fields.items()
            if isinstance(extra := info.json_schema_extra, dict) and extra.get("short")
        },
        add_argument_method=partial(_add_argument, kind),
    )
    _add_scorer_flags(kind, parser, argv)
    parsed, unknown = parser.parse_known_args(list(argv))
    file = vars(parsed).pop(":config")
    problems += _unknown_flags(kind, unknown)
    texts = {tuple(key.split(".")): value for key, value in vars(parsed).items()}
    names = {path: spell_flag(path) for path in texts}
    if not _tables_are_json(texts, names, problems):
        return Layer({}, "the command line"), file and Path(file).expanduser()
    values = source(parsed_args=parsed)()
    layer = _decoded(Layer(values, "the command line", names), texts, problems)
    return layer, file and Path(file).expanduser()


def given_flags(kind: type[CommonSettings], argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the top-level settings that flags set, or parts of which they set."""
    layer, _ = _flags(kind, argv, [])
    return frozenset(path[0] for path in layer.names)


def _add_argument(kind: Model, target: Any, *flags: str, **options: Any) -> Any:
    """Add a flag as pydantic-settings asks for it, but for prompts and lists."""
    place = locate(kind, tuple(options["dest"].split(".")))
    if place.kind == "table" and place.model is PromptSource:  # --prompts FILE
        options = {"dest": f"{options['dest']}.source", "default": SUPPRESS}
    if place.field is not None and get_origin(place.field.annotation) is tuple:
        options.update(action=_ListAction, nargs="+")
    if options.get("action") is BooleanOptionalAction:
        options.update(action=_Switch)
    if flags[-1].startswith("--"):  # errors name the first one
        flags = flags[::-1]
    return target.add_argument(*flags, **options)


class _Switch(BooleanOptionalAction):
    """`--quiet`, `--no-quiet`, and `--quiet true` as programs write it."""

    def __init__(self, *flags: Any, **options: Any) -> None:
        super().__init__(*flags, **options)
        self.nargs = "?"

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if values is None:
            super().__call__(parser, namespace, values, option)
        elif option.startswith("--no-"):
            raise ConfigError(f"{option} takes no value")
        else:
            setattr(namespace, self.dest, values)


class _ListAction(Action):
    """Collects one value as it is, several as a JSON array, over all uses of the flag."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        self.collected = [*getattr(self, "collected", []), *values]
        one, *more = self.collected
        setattr(namespace, self.dest, json.dumps(self.collected) if more else one)


def _add_scorer_flags(kind: Model, parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Add flags below tables whose names only the user knows, which the library has none for."""
    added = set()
    for word in argv:
        flag = word.partition("=")[0]
        positive = "--" + flag.removeprefix("--no-").removeprefix("--")
        path = _path_of(positive)
        place = locate(kind, path)
        if len(path) < 2 or path[0] != "scorers" or place.kind == "unknown" or positive in added:
            continue
        added.add(positive)
        options: dict[str, Any] = {"dest": ".".join(path), "default": SUPPRESS}
        if place.kind == "leaf" and place.field and without_none(place.field.annotation) is bool:
            options["action"] = _Switch
        parser.add_argument(positive, **options)


def _path_of(flag: str) -> KeyPath:
    return tuple(flag.lstrip("-").replace("-", "_").split("."))


def _unknown_flags(kind: Model, words: Sequence[str]) -> list[str]:
    problems: list[str] = []
    value_may_follow = False
    for word in words:
        flag = word.partition("=")[0]
        if flag.startswith("-") and len(flag) > 1:
            hint = _retired(_path_of(flag), spell_flag, kind)
            nearest = nearest_known(kind, _path_of(flag), spell_flag, OTHER_FLAGS)
            hint = hint or _did_you_mean(nearest, "`heretic-kl --help-all` lists every setting")
            problems.append(f"unknown flag {flag}; {hint}")
        elif not value_may_follow:
            way = "candidate" if "candidate" in fields_of(kind) else "model"
            problems.append(f"unexpected argument {word!r}; a model is given as --{way} {word}")
        value_may_follow = flag.startswith("-") and "=" not in word
    return problems


# --- values ---------------------------------------------------------------------------------


def _tables_are_json(
    texts: Mapping[KeyPath, Any], names: Mapping[KeyPath, str], problems: list[str]
) -> bool:
    """Note where a whole table is given that is no JSON object, or has unknown keys."""
    count = len(problems)
    for path, text in texts.items():
        if locate(Settings, path).kind == "table" and isinstance(text, str):
            value = _json(text)
            if isinstance(value, dict):
                nested: Any = value
                for key in reversed(path):
                    nested = {key: nested}
                _checked(Layer(nested, names[path]), problems, path)
            else:
                problems.append(
                    f"{spell_key(path)} must be a table, as a JSON object, got {text!r} "
                    f"({names[path]})"
                )
    return len(problems) == count


def _decoded(layer: Layer, texts: Mapping[KeyPath, Any], problems: list[str]) -> Layer:
    """Read scorers' own settings, which pydantic-settings leaves as text, as JSON or text."""
    for path, text in texts.items():
        if locate(Settings, path).kind != "open" or not isinstance(text, str):
            continue
        value = _json(text)
        if value is None and text != NULL:
            if text.lstrip()[:1] in ("[", "{"):
                problems.append(
                    f"{spell_key(path)} must be valid JSON, got {text!r} ({layer.names[path]})"
                )
            value = text
        table, _ = layer.find(path[:-1]) or ({}, "")
        table[path[-1]] = value
    return layer


def _json(text: str) -> Any:
    """Return the value of JSON text; None where it is none."""
    try:
        return json.loads(text, parse_constant=lambda name: None)
    except ValueError:
        return None


# --- what is said ---------------------------------------------------------------------------


def _did_you_mean(nearest: str | None, otherwise: str) -> str:
    return f"did you mean {nearest}?" if nearest else otherwise


def _retired(path: KeyPath, spell: Callable[[KeyPath], str], kind: Model = Settings) -> str | None:
    """Say what became of a key that there was, where it is no key of today."""
    name = new_name(spell_key(path))
    if name is None or locate(kind, path).kind in ("leaf", "table"):
        return None
    path = tuple(name.split("."))
    if not name:
        return "it was removed"
    return None if locate(kind, path).kind == "unknown" else f"it is now {spell(path)}"


def _explained(kind: Model, error: ValidationError, layers: Sequence[Layer]) -> list[str]:
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
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
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
