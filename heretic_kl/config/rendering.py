"""Settings as text: `--help` and config.default.toml, both from the fields. Reads no settings."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from heretic_kl.config.keys import (
    ANY_NAME,
    KeyPath,
    allowed,
    choices,
    inner_model,
    leaves,
    spell_flag,
    without_none,
)
from heretic_kl.config.settings import DEFAULT_SCORERS, Settings
from heretic_kl.config.tables import PromptKindTable, PromptsTable, PromptTable

COMMENT_WIDTH = 92

# --- config.default.toml --------------------------------------------------------------------


def default_config_toml(
    scorer_defaults: Mapping[str, Mapping[str, tuple[Any, str]]] | None = None,
) -> str:
    """Return the default configuration, every setting with its comment.

    Args:
        scorer_defaults: Scorer name -> setting -> (default, description), for the
            `[scorers.NAME.settings]` tables, which only the scorers know.
    """
    lines = [
        "# Every setting of heretic-kl with its default. Copy what you change into a config.toml",
        "# in the folder you run in, or name a file with --config. The command line goes over",
        "# environment variables (HERETIC_KL_SEED, HERETIC_KL_EDIT__NORM), these over the file.",
    ]
    group = None
    for name, info in Settings.model_fields.items():
        if inner_model(info)[0] is not None:
            continue
        if _group(info) != group:
            group = _group(info)
            lines += ["", f"# {'-' * 4} {group} {'-' * (COMMENT_WIDTH - 6 - len(group))}"]
        lines += ["", *_comment(info), _assignment(name, info)]
    lines += _prompt_tables()
    for name in ("directions", "edit"):
        model, _ = inner_model(Settings.model_fields[name])
        assert model is not None
        lines += ["", "", f"[{name}]"]
        for key, info in model.model_fields.items():
            lines += [*_comment(info), _assignment(key, info)]
    lines += _scorer_tables(scorer_defaults or {})
    return "\n".join(lines) + "\n"


def _prompt_tables() -> Iterator[str]:
    yield from ("", "")
    yield from _wrapped(
        "Prompts, by kind and use. A table that names no source is filled by prompt_set. "
        "The keys of the first table stand for those of all six."
    )
    first = True
    for kind, kind_info in PromptsTable.model_fields.items():
        for use, use_info in PromptKindTable.model_fields.items():
            yield ""
            yield f"[prompts.{kind}.{use}]  # {kind_info.description}: {use_info.description}"
            for key, info in PromptTable.model_fields.items():
                if first:
                    yield from _comment(info)
                yield _assignment(key, info)
            first = False


def _scorer_tables(settings: Mapping[str, Mapping[str, tuple[Any, str]]]) -> Iterator[str]:
    model, _ = inner_model(Settings.model_fields["scorers"])
    assert model is not None
    yield from ("", "")
    yield from _wrapped(
        "Scorers, each in a table of its own name; a new name adds one, enabled = false leaves "
        "one out. The keys of the first table stand for those of all."
    )
    for position, (name, defaults) in enumerate(DEFAULT_SCORERS.items()):
        yield from ("", f"[scorers.{name}]")
        for key, info in model.model_fields.items():
            if key == "settings":
                continue
            if position == 0:
                yield from _comment(info)
            yield _assignment(key, info, defaults.get(key))
        if settings.get(name):
            yield from ("", f"[scorers.{name}.settings]")
            for key, (default, description) in settings[name].items():
                yield from _wrapped(description)
                value = toml_value(default)
                yield f"# {key} =" if value is None else f"{key} = {value}"


def _comment(info: FieldInfo) -> list[str]:
    text = f"{info.description}."
    if choices(info) or without_none(info.annotation) in (int, float):
        expected = allowed(info)
        text += f" {expected[0].upper()}{expected[1:]}."
    return _wrapped(text)


def _wrapped(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, COMMENT_WIDTH, break_on_hyphens=False)]


def _assignment(key: str, info: FieldInfo, default: Any = None) -> str:
    value = toml_value(default if default is not None else info.default)
    if value is not None:
        return f"{key} = {value}"
    return f"# {key} = {toml_value((info.examples or [''])[0])}"


def toml_value(value: Any) -> str | None:
    """Write a value as TOML; None, which TOML cannot write, is None."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, PurePath):
        value = value.as_posix()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = [f"{json.dumps(str(key))} = {toml_value(v)}" for key, v in value.items()]
        return "{ " + ", ".join(pairs) + " }" if pairs else "{}"
    return _toml_list([toml_value(item) or '""' for item in value])


def _toml_list(items: list[str]) -> str:
    short = "[" + ", ".join(items) + "]"
    if len(short) <= COMMENT_WIDTH - 20:
        return short
    return "[\n" + "".join(f"    {item},\n" for item in items) + "]"


# --- --help ---------------------------------------------------------------------------------


def settings_help(preset: Mapping[str, Any] | None = None, width: int = 100) -> str:
    """Return every setting as a flag with its default, in groups; `preset` changes defaults."""
    lines: list[str] = []
    group = None
    for path, info in _shown_leaves():
        this = _group(Settings.model_fields[path[0]])
        if this != group:
            group = this
            lines += ["", f"{group}:", *textwrap.wrap(_GROUP_NOTES.get(group, ""), width)]
        default = (preset or {}).get(path[0], info.default) if len(path) == 1 else info.default
        text = (info.description or "") + _default_note(default)
        lines += help_entry(_flag_usage(path, info), text, width)
    return "\n".join(lines).lstrip("\n")


_GROUP_NOTES = {
    "Prompts": "KIND is harmful or harmless; USE is train (finds the directions), search (measures "
    "every trial) or report (measures the final trials): --prompts.harmful.train.source FILE",
    "Scorers": f"NAME is a scorer: {', '.join(DEFAULT_SCORERS)}, or one of yours",
}


def _shown_leaves() -> Iterator[tuple[KeyPath, FieldInfo]]:
    for name, info in Settings.model_fields.items():
        model, named = inner_model(info)
        if model is None:
            yield (name,), info
        elif model is PromptsTable:
            yield from leaves(PromptTable, (name, "KIND", "USE"))
        else:
            yield from leaves(model, (name, ANY_NAME) if named else (name,))


def _flag_usage(path: KeyPath, info: FieldInfo) -> str:
    flag = spell_flag(path)
    kind = without_none(info.annotation)
    if kind is bool:
        return f"{flag}, --no-{flag[2:]}"
    if path[-1] == "settings":
        return f"{flag}.KEY VALUE"
    if values := choices(info):
        return f"{flag} {{{','.join(values)}}}"
    metavars: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}
    return f"{flag} {metavars.get(kind, 'PATH')}"


def _default_note(default: Any) -> str:
    if default is None or default is PydanticUndefined or default == "":
        return ""
    if isinstance(default, tuple):
        default = ",".join(default)
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f" [{default}]"


def help_entry(usage: str, text: str, width: int, column: int = 30) -> list[str]:
    """Lay out one flag or command: the usage, and its text in a column of its own."""
    indent = " " * column
    body = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    head = f"  {usage}"
    if len(head) + 1 < column and body:
        return [head.ljust(column) + body[0].lstrip(), *body[1:]]
    return [head, *body]


def _group(info: FieldInfo) -> str:
    extra = info.json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else ""
