"""config.default.toml from the settings' fields: one line a setting. Reads no settings."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import tomlkit
from pydantic.fields import FieldInfo

from heretic_kl.config.keys import KeyPath, choices, fields_of, inner_model, spell_key
from heretic_kl.config.settings import DEFAULT_SCORERS, Settings
from heretic_kl.config.tables import ScorerTable
from heretic_kl.prompts.source import PromptSource

WIDTH = 100
HEADER = """\
# All settings with their defaults. Copy what you change into config.toml in the folder you run in,
# or name a file with --config. Flags override variables (HERETIC_KL_EDIT__NORM), these the file.
"""
PROMPTS_NOTE = """\
# KIND is harmful (draws the behaviour to remove), harmless (must not change) or borderline (only
# sounds harmful); USE is train (finds the directions), validation (measures every trial) or test
# (measures the final trials). All take the keys below; the prompt set provides the others.
"""
PROMPT_EXAMPLES = {
    "source": "my_prompts.txt",
    "split": "train[:400]",
    "column": "text",
    "prefix": "",
    "suffix": "",
    "system": "Be brief.",
    "limit": 100,
    "subset": "main",
    "revision": "v1.0",
}


def default_config_toml(
    scorer_settings: Mapping[str, Mapping[str, tuple[Any, str]]] | None = None,
) -> str:
    """Return the default configuration, every setting with its comment.

    Args:
        scorer_settings: scorer name -> setting -> (default, description), which only the scorers
            know.
    """
    lines = [HEADER.rstrip()]
    for heading, names in Settings.headings.items():
        lines += ["", f"# ---- {heading} {'-' * (WIDTH - 8 - len(heading))}"]
        if heading == "Prompts":
            lines += [PROMPTS_NOTE.rstrip(), *_prompt_table()]
        elif heading == "Scorers":
            lines += _scorers(scorer_settings or {})
        else:
            lines += _laid_out(_rows(names))
    return "\n".join(lines) + "\n"


def _rows(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield an assignment and its comment for each setting, tables' with dotted keys."""
    for name in names:
        info = fields_of(Settings)[name]
        inner, _ = inner_model(info)
        rows: Mapping[KeyPath, FieldInfo] = {(name,): info}
        if inner is not None:
            rows = {(name, key): field for key, field in fields_of(inner).items()}
        for path, field in rows.items():
            comment, listed = field.description or "", ", ".join(choices(field))
            if listed and not all(choice in comment for choice in choices(field)):
                comment += f": {listed}"
            yield _assignment(path, field.default, (field.examples or [""])[0]), comment


def _prompt_table() -> list[str]:
    fields = fields_of(PromptSource)
    return _laid_out(
        (f"# {spell_key(('prompts', 'harmful', 'train', key))} = {toml_value(example)}",
         fields[key].description or "")
        for key, example in PROMPT_EXAMPLES.items()
    )  # fmt: skip


def _scorers(settings: Mapping[str, Mapping[str, tuple[Any, str]]]) -> list[str]:
    lines = ["# A new name adds a scorer. Every scorer has these three keys and its own settings."]
    fields = fields_of(ScorerTable)
    documented: set[tuple[str, str]] = set()
    for position, (name, table) in enumerate(DEFAULT_SCORERS.items()):
        path = ("scorers", name)
        shown = ("use", "role", "enabled") if position == 0 else ("role",)
        rows = []
        for key in shown:
            comment = fields[key].description or ""
            if key == "role":
                comment += f": {', '.join(choices(fields[key]))}"
            value = table.get(key, fields[key].default)
            example = (fields[key].examples or [""])[0]
            rows.append((_assignment((*path, key), value, example), comment * (position == 0)))
        for key, (value, description) in settings.get(name, {}).items():
            comment = "" if (key, description) in documented else description
            documented.add((key, description))
            rows.append((_assignment((*path, "settings", key), value, None), comment))
        lines += _laid_out(rows)
    return lines


def _assignment(path: KeyPath, value: Any, example: Any) -> str:
    if value is not None:
        return f"{spell_key(path)} = {toml_value(value)}"
    shown = "" if example is None else f" {toml_value(example)}"
    return f"# {spell_key(path)} ={shown}"


def _laid_out(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Put comments in a column beside the assignments, or above those too long for that."""
    rows = [(row, text.rstrip(".")) for row, text in rows]
    sizes = sorted(len(row) for row, text in rows if len(row) + len(text) + 4 <= WIDTH)
    # The widest column that lets the most comments stand beside their assignments.
    column = max(
        reversed(sizes or [0]),
        key=lambda size: sum(len(row) <= size <= WIDTH - 4 - len(text) for row, text in rows),
    )
    lines: list[str] = []
    for row, text in rows:
        if not text:
            lines.append(row)
        elif len(row) <= column <= WIDTH - 4 - len(text):
            lines.append(f"{row.ljust(column)}  # {text}")
        else:
            lines += [f"# {line}" for line in textwrap.wrap(text, WIDTH - 2)]
            lines.append(row)
    return lines


def toml_value(value: Any) -> str:
    """Write a value as TOML, tables on one line."""
    if isinstance(value, Mapping):
        table = tomlkit.inline_table()
        table.update(value)
        return str(table.as_string())
    if isinstance(value, PurePath):
        value = value.as_posix()
    return str(tomlkit.item(list(value) if isinstance(value, tuple) else value).as_string())
