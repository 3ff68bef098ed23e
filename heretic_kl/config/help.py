"""`--help` and `--help-all` of every command from its settings' fields. Reads no settings."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from heretic_kl.config.keys import (
    ANY_NAME,
    KeyPath,
    choices,
    fields_of,
    inner_model,
    spell_flag,
    without_none,
)
from heretic_kl.config.settings import DEFAULT_SCORERS, ProgramSettings
from heretic_kl.config.tables import PromptsTable
from heretic_kl.prompts.source import PromptSource

COLUMN = 30
_NOTES = {
    "Prompts": "KIND is harmful, harmless or borderline; USE is train (finds the directions), "
    "validation (measures every trial) or test (measures the final trials)",
    "Scorers": f"NAME is a scorer: {', '.join(DEFAULT_SCORERS)}, or one of yours",
}
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT"}


def settings_help(
    kind: type[ProgramSettings],
    *,
    everything: bool,
    preset: Mapping[str, Any] | None = None,
    width: int = 100,
) -> str:
    """Return settings as flags with their defaults, in groups.

    Args:
        kind: the settings of a command.
        everything: show all of them, not only the headings that people use first.
        preset: other defaults than the settings' own.
        width: of a line.
    """
    lines: list[str] = []
    for heading in kind.headings if everything else kind.shown_first:
        lines += ["", f"{heading}:", *textwrap.wrap(_NOTES.get(heading, ""), width)]
        for path, info in _flags({name: fields_of(kind)[name] for name in kind.headings[heading]}):
            default = info.default
            if len(path) == 1 and preset is not None:
                default = preset.get(path[0], default)
            text = info.description or ""
            if preset is not None:
                text = text.removesuffix(" (required)")
            if info.default is True:  # the flag is --no-...
                text = f"Do not {text[:1].lower()}{text[1:]}"
            lines += help_entry(_usage(path, info), text + _default_note(default), width)
    return "\n".join(lines).lstrip("\n")


def help_entry(usage: str, text: str, width: int) -> list[str]:
    """Lay out one flag or command: the usage, and its text in a column of its own."""
    indent = " " * COLUMN
    body = textwrap.wrap(
        text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    head = f"  {usage}"
    if len(head) + 1 < COLUMN and body:
        return [head.ljust(COLUMN) + body[0].lstrip(), *body[1:]]
    return [head, *body]


def _flags(
    fields: Mapping[str, FieldInfo], above: KeyPath = ()
) -> Iterator[tuple[KeyPath, FieldInfo]]:
    for name, info in fields.items():
        path, (model, by_name) = (*above, name), inner_model(info)
        if model is None:
            yield path, info
        elif model is PromptsTable:
            yield from _flags(fields_of(PromptSource), (*path, "KIND", "USE"))
        else:
            yield from _flags(fields_of(model), (*path, ANY_NAME) if by_name else path)


def _usage(path: KeyPath, info: FieldInfo) -> str:
    flag, kind = spell_flag(path), without_none(info.annotation)
    short = str(_extra(info, "short"))
    if len(short) > 1:  # another name for the flag
        short, flag = "", f"--{short}"
    short = f"-{short}, " if short else ""
    if path[-1] == "settings":
        return f"{flag}.KEY VALUE"
    if path[-1] == "source":
        return f"{spell_flag(path[:-1])} SOURCE"
    if kind is bool:
        return f"--no-{flag[2:]}" if info.default else f"{short}{flag}"
    metavar = _extra(info, "metavar") or (
        f"{{{','.join(choices(info))}}}" if choices(info) else _METAVARS.get(kind, "FILE")
    )
    return f"{short}{flag} {metavar}"


def _default_note(default: Any) -> str:
    if default in (None, PydanticUndefined, "", (), {}) or isinstance(default, bool):
        return ""
    return f" [{','.join(default) if isinstance(default, tuple) else default}]"


def _extra(info: FieldInfo, key: str) -> Any:
    extra = info.json_schema_extra
    return extra.get(key, "") if isinstance(extra, dict) else ""
