"""The pages of the reference that are generated: every setting, every flag, the Python API."""

import ast
import importlib
import inspect
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

from heretic_kl.cli.command import SUMMARIES, load_command
from heretic_kl.config import Settings
from heretic_kl.config.default_file import toml_value
from heretic_kl.config.keys import KeyPath, allowed, choices, leaves, spell_key
from heretic_kl.scoring import built_in_scorers, documented_settings

WIDTH = "88"
"""Characters of a line of help."""
API = {
    "api/heretic_kl": {
        "heretic_kl": "Session, Settings, Prompt, DatasetSpec, load_prompts",
        "heretic_kl.errors": "",
    },
    "api/score": {"heretic_kl.score": ""},
    "api/scoring": {"heretic_kl.scoring": ""},
    "api/kl": {"heretic_kl.kl": ""},
    "api/integrations": {
        "heretic_kl.integrations": "HERETIC_PLUGIN, KLObjective, TeacherForcedKLCallback, "
        "TeacherForcedKLMixin"
    },
    "api/testing": {"heretic_kl.testing": ""},
}
"""The modules that a page documents, and which of their public names (empty: all)."""
INTERNAL = ("model_config", "lowest", "headings", "shown_first", "everywhere")
SECTION = re.compile(r"(Args|Returns|Raises|Yields|Attributes|Note|Example)s?:$")


def add_reference(app: Sphinx, page: str, source: list[str]) -> None:
    """Append what is generated to the page that introduces it."""
    if page == "every-setting":
        source[0] += "\n".join(all_settings())
    elif page == "every-flag":
        source[0] += "\n".join(all_flags())
    elif page in API:
        source[0] += "".join(map(module_reference, *zip(*API[page].items(), strict=True)))


def module_reference(module: str, names: str) -> str:
    """What autodoc says of a module; constants and types are found where they are assigned."""
    lines = [f".. automodule:: {module}", f"   :members: {names}"]
    loaded = importlib.import_module(module)
    for node in ast.parse(inspect.getsource(loaded)).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            value = getattr(loaded, alias.name)
            if (
                alias.name[0] != "_"
                and alias.name in getattr(loaded, "__all__", ())
                and not (inspect.isclass(value) or inspect.isfunction(value))
            ):
                lines += ["", f".. autodata:: {node.module}.{alias.name}", "   :no-value:"]
    return "\n\n" + "\n".join(["```{eval-rst}", *lines, "```"]) + "\n"


def all_settings() -> Iterator[str]:
    """Tables of the settings of a search below their headings, and of the scorers' own."""
    by_name: dict[str, list[tuple[KeyPath, Any]]] = {}
    for path, info in leaves(Settings):
        if path[0] == "prompts" and path[1:3] != ("harmful", "train"):
            continue  # every kind and use has the same keys
        by_name.setdefault(path[0], []).append((path, info))
    for heading, names in Settings.headings.items():
        yield from ("", f"## {heading}", "")
        rows = [setting_row(path, info) for name in names for path, info in by_name[name]]
        yield from table(rows)
    yield from ("", "## Settings of the scorers", "", "Below `scorers.NAME.settings`.")
    for name in built_in_scorers():
        yield from ("", f"### {name}", "")
        yield from table(
            (f"`{key}`", code(default), description)
            for key, (default, description) in documented_settings(name).items()
        )


def setting_row(path: KeyPath, info: Any) -> tuple[str, str, str]:
    """Name and flag of a setting, its default, and what it does."""
    if path[0] == "prompts":
        path = ("prompts", "KIND", "USE", path[-1])
    extra = info.json_schema_extra or {}
    short = str(extra.get("short", ""))
    flags = [f"-{short}"] if len(short) == 1 else [f"--{short}"] if short else []
    key = spell_key(path)
    name = ", ".join(
        [
            f"[`{key}`]{{#setting-{re.sub('[._]', '-', key).lower()}}}",
            *(f"`{flag}`" for flag in flags),
        ]
    )
    text = (info.description or "").rstrip(".")
    values = allowed(info)
    if not all(choice in text for choice in choices(info)) or "more" in values or " to " in values:
        text += f": {values.removeprefix('one of ')}"
    default = info.get_default(call_default_factory=True)
    return name, code(default), text


def code(value: Any) -> str:
    """A default as TOML writes it; empty where there is none."""
    return "" if value in (None, PydanticUndefined, {}) else f"`{toml_value(value)}`"


def table(rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table of settings."""
    yield "| setting | default | what |"
    yield "|---|---|---|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def all_flags() -> Iterator[str]:
    """What `--help-all` shows of every command."""
    os.environ["COLUMNS"] = WIDTH
    for name in SUMMARIES:
        text = load_command(name).help(everything=True, commands=False)
        yield from ("", f"## {name}", "", "```text", text, "```")


def read_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]):
    """Turn a docstring into reStructuredText: Google's sections, and indented blocks as they are.

    Of attributes too: napoleon, as an extension, would take what stands before a colon as a type.
    """
    written: list[str] = []
    before = ""
    if what == "data" and lines[:1] == (inspect.getdoc(type(obj)) or "").splitlines()[:1]:
        lines.clear()  # a constant's type describes itself, not the constant
    for line in lines:
        starts = line.startswith("    ") and not (written and written[-1].strip())
        if starts and before and not before.startswith((" ", "- ")) and not SECTION.match(before):
            written += ["::", ""]
        if line.strip():
            before = line
        written.append(line)
    fields = (
        getattr(obj, "__pydantic_fields__", {}) if what == "class" and obj is not Settings else {}
    )
    if any(info.description for info in fields.values()):
        written += ["", "Args:"]
        described = ((key, info.description) for key, info in fields.items() if info.description)
        written += [f"    {key}: {text}" for key, text in described]
    config = Config(napoleon_use_rtype=False, napoleon_use_ivar=True)
    lines[:] = GoogleDocstring(written, config, app, "class", name, obj, options).lines()


def is_internal(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out fields without a docstring, and what settings say to the program alone."""
    generated = str(getattr(obj, "__doc__", "")).startswith("Alias for field number")
    return True if generated or name in INTERNAL else None


def short_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returns: str
) -> tuple[str, str] | None:
    """Name the fields of settings and their defaults, without pydantic's annotations."""
    fields = getattr(obj, "__pydantic_fields__", None)
    if not isinstance(obj, type) or fields is None:
        return None
    if obj is Settings:
        return "(**settings)", returns
    defaults = ("" if info.is_required() else f"={info.default!r}" for info in fields.values())
    return f"({', '.join(map(''.join, zip(fields, defaults, strict=True)))})", returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Have the reference appended, and docstrings read."""
    app.connect("source-read", add_reference)
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-skip-member", is_internal)
    app.connect("autodoc-process-signature", short_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
