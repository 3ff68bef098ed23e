"""Text fit to be published: no path of this machine, no secret. Knows nothing about models."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from heretic_kl.errors import printable
from heretic_kl.files import TOKENS

ABSOLUTE_PATH = re.compile(
    r"""(?<![\w.:/\\~-])            # not inside a word, a relative path or a URL
    (?:/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)   # POSIX root, home folder, Windows drive or share
    (?:[^\s'"`,;<>()\[\]{}|]*[\\/])?      # the folders
    ([^\s'"`,;<>()\[\]{}|\\/]+)[\\/]?     # the last name, which stays
    """,
    re.VERBOSE,
)
QUOTED_PATH = re.compile(
    r"""(?P<quote>['"])(?:/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)
    (?:[^'"\n]*[\\/])?(?P<name>[^'"\\/\n]+)[\\/]*(?P=quote)""",
    re.VERBOSE,
)
"""A path with blanks, as a shell writes it."""
DATABASE_FILE = re.compile(r"\b((?:sqlite|journal|file)(?:\+\w+)?:///)/*(?:[^\s'\"?]*/)")
CREDENTIALS = re.compile(r"://[^\s/@]+@")
SECRET_NAMES = re.compile(r"(?:^|_)(?:token|secret|password|passwd|api_key|access_key)$")
SECRET_OPTION = re.compile(
    r"((?<![\w-])--?[\w.-]*(?:token|secret|password|passwd|api[-_]key|access[-_]key)[= ])\S+"
)
PROMPT_KEYS = frozenset({"prefix", "suffix", "system", "response_prefix"})
"""Text given to a model, which must stay as it is: `/no_think` is no path."""


def portable_text(text: str) -> str:
    """The text with absolute paths cut to their last name and secrets blotted out."""
    text = TOKENS.sub("***", SECRET_OPTION.sub(r"\1***", CREDENTIALS.sub("://***@", text)))
    text = DATABASE_FILE.sub(r"\1", text)
    text = QUOTED_PATH.sub(r"\g<quote>\g<name>\g<quote>", text)
    return ABSOLUTE_PATH.sub(r"\1", text)


def markdown_text(text: str) -> str:
    """The text as one line of Markdown that shows it: it can hold no HTML, link, code or cell."""
    line = " ".join(printable(text).split())
    return html.escape(re.sub(r"[\\`|]|(?<=\])\(", r"\\\g<0>", line), quote=False)


def portable(value: Any, key: str = "") -> Any:
    """The same for JSON-ready data; entries named like secrets are blotted out whole."""
    if isinstance(value, Mapping):
        return {str(name): portable(entry, str(name)) for name, entry in value.items()}
    if isinstance(value, str):
        if SECRET_NAMES.search(key.lower()):
            return "***"
        return TOKENS.sub("***", value) if key in PROMPT_KEYS else _whole_path(value)
    if isinstance(value, Sequence):
        return [portable(entry, key) for entry in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _whole_path(str(value))  # a Path, a dtype


def _whole_path(value: str) -> str:
    """A value that is one path, with spaces in it perhaps, or else a text with paths in it."""
    single = re.fullmatch(r"(?:/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)[^:\n]*?([^\\/\n:]+)[\\/]*", value)
    return single[1] if single else portable_text(value)
