"""The parser of all commands' flags, for pydantic-settings. Lists no setting."""

import json
from argparse import SUPPRESS, Action, ArgumentParser, BooleanOptionalAction
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_origin

from pydantic_settings import CliSettingsSource

from heretic_kl.config.keys import (
    KeyPath,
    Model,
    fields_of,
    locate,
    nearest_known,
    spell_flag,
    without_none,
)
from heretic_kl.config.layers import NULL, Layer, decoded, did_you_mean, retired, tables_are_json
from heretic_kl.config.settings import ProgramSettings
from heretic_kl.errors import ConfigError
from heretic_kl.files import expanded
from heretic_kl.prompts.source import PromptSource

OTHER_FLAGS = ("--config", "--help", "--help-all", "--version")


class _Parser(ArgumentParser):
    """Says what is wrong in one line, by raising."""

    def error(self, message: str) -> NoReturn:
        argument, _, problem = message.removeprefix("argument ").partition(": ")
        flag = argument.split("/")[0]
        if problem.startswith("expected"):
            raise ConfigError(f"{flag} needs a value ({flag}=VALUE for one that begins with -)")
        raise ConfigError(message)


def read_flags(
    kind: type[ProgramSettings], argv: Sequence[str], problems: list[str]
) -> tuple[Layer, Path | None]:
    """Read the flags; return them and the file that `--config` names."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-c", dest=":config", default=None)
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
    if file and "\0" in file:
        raise ConfigError(f"--config must be a path without NUL, got {file!r}")
    problems += _unknown_flags(kind, unknown)
    texts = {tuple(key.split(".")): value for key, value in vars(parsed).items()}
    names = {path: spell_flag(path) for path in texts}
    for path, name in names.items():
        if hint := retired(path, spell_flag, kind):
            problems.append(f"unknown flag {name}; {hint}")
    if not tables_are_json(texts, names, problems):
        return Layer({}, "the command line"), file and expanded(file)
    values = source(parsed_args=parsed)()
    layer = decoded(Layer(values, "the command line", names), texts, problems)
    return layer, file and expanded(file)


def given_flags(kind: type[ProgramSettings], argv: Sequence[str]) -> frozenset[str]:
    """Return the names of the top-level settings that flags set, or parts of which they set."""
    layer, _ = read_flags(kind, argv, [])
    return frozenset(path[0] for path in layer.names)


def _add_argument(kind: Model, target: Any, *flags: str, **options: Any) -> Any:
    """Add a flag as pydantic-settings asks for it, but for prompts and lists."""
    place = locate(kind, tuple(options["dest"].split(".")))
    if place.kind == "table" and place.model is PromptSource:  # --prompts FILE
        options = {"dest": f"{options['dest']}.source", "default": SUPPRESS}
    if place.field is not None and get_origin(place.field.annotation) is tuple:
        options.update(action=_ListAction, nargs="+")
    elif place.kind == "table":  # the library would take the flag alone as an empty table
        options.pop("nargs", None)
        options.pop("const", None)
    extra = place.field.json_schema_extra if place.kind == "leaf" and place.field else None
    if isinstance(extra, dict) and extra.get("bare"):
        options.update(nargs="?", const=extra["bare"])
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
            hint = retired(_path_of(flag), spell_flag, kind)
            nearest = nearest_known(kind, _path_of(flag), spell_flag, OTHER_FLAGS)
            hint = hint or did_you_mean(nearest, "`heretic-kl --help-all` lists every setting")
            problems.append(f"unknown flag {flag}; {hint}")
        elif not value_may_follow:
            way = "candidate" if "candidate" in fields_of(kind) else "model"
            problems.append(f"unexpected argument {word!r}; a model is given as --{way} {word}")
        value_may_follow = flag.startswith("-") and "=" not in word
    return problems
