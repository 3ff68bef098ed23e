"""A reproduction file read back as checked data. It may come from anyone: nothing in it is run.

What is taken from it are numbers, names of the hub and of built-in parts, and bare file names.
Plug-ins, code of a model, templates and paths have to be named by whoever reads it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from heretic_kl.ablation import EditParameters
from heretic_kl.errors import ReproductionError, plain_line
from heretic_kl.export.reproduction_writer import LEARNED_FILE, REPRODUCTION_FILE
from heretic_kl.files import sha256_file
from heretic_kl.scoring import Score, built_in_scorers

FILE_NAMES: Final = (REPRODUCTION_FILE, "heretic-kl.json")
"""What the file is called in a folder, the newest name first."""
LARGEST_FILE: Final = 64 * 2**20
TAKEN: Final = (
    *(
        "seed",
        "kl_tokens",
        "test_kl_tokens",
        "max_response_tokens",
        "enable_thinking",
        "response_prefix",
    ),
    *("edit", "directions", "prompts", "prompt_set", "scorers", "save_dtype"),
    *("quantization", "dtype", "batch_size", "chat_template", "chat_template_kwargs"),
    *("screening", "refine", "refinement"),
)
"""Settings that are taken from a file: those that an edit, its scores or a study depend on."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SOURCE = re.compile(r"builtin:\w+|\w[\w .-]*(/\w[\w.-]*)?")
"""A built-in set, a hub id or the name of a file in the current folder."""
_COMMIT = re.compile("[0-9a-f]{40}")
_FROM_COMMAND = ("dtype", "batch_size", "response_prefix", "prompt_set")


def _plain(text: str) -> str:
    if len(text) > 10_000 or not text.isprintable():
        raise PydanticCustomError("plain", "text on one line without control characters")
    return text


Plain = Annotated[str, AfterValidator(_plain)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Base(_Part):
    """The original."""

    name: Plain
    on_hub: bool
    revision: Annotated[str, Field(pattern=r"^\w[\w./-]*$")] | None = None


class Trial(_Part):
    """The edit and where it came from."""

    number: int = Field(ge=0)
    of: int = Field(ge=0)
    pick_rule: Plain | None = None
    parameters: dict[Plain, bool | int | float | Plain]
    edit: EditParameters

    @field_validator("edit")
    @classmethod
    def _finite(cls, edit: EditParameters) -> EditParameters:
        numbers = [value for kernel in edit.kernels.values() for value in vars(kernel).values()]
        if not all(map(math.isfinite, [*numbers, edit.direction_position or 0.0])):
            raise PydanticCustomError("finite", "finite numbers")
        return edit


class SavedFile(_Part):
    """Of the saved model."""

    bytes: int
    sha256: Plain


class Scores(_Part):
    """One score on the test prompts."""

    saved: Score | None = None


class Reproduction(_Part):
    """What a saved model was made of."""

    path: Path
    """Of the file."""
    format: Literal[2, 3]
    form: Literal["merged", "lora"]
    base: Base
    trial: Trial
    test_scores: dict[Plain, Scores]
    settings: dict[str, Any]
    """As they are in the file; see `taken_settings`."""
    versions: dict[Plain, Plain]
    platform: Plain = ""
    identity: dict[Plain, Any] = Field(default_factory=dict)
    prompts: list[dict[str, Any]] = Field(default_factory=list)
    """Where each set of prompts was from."""
    calibration: dict[str, Any] = Field(default_factory=dict)
    command: str = ""
    files: dict[str, SavedFile]

    @property
    def folder(self) -> Path:
        """Where the file is, and with it perhaps the saved model."""
        return self.path.parent

    def taken_settings(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The settings that a run takes from the file, and what was left out, in words.

        Raises:
            ReproductionError: the file names the path of a prompt source.
        """
        settings: dict[str, Any] = {
            key: self.settings[key] for key in TAKEN if key in self.settings
        }
        settings.update(self._found_out())
        if "prompts" in settings:
            settings["prompts"] = self._pinned(settings["prompts"])
        left_out = []
        scorers = {}
        for name, table in _table(settings.get("scorers")).items():
            use = _table(table).get("use") or name
            if use == "judge":  # names a server and the variable of its key
                left_out.append(f"scorer {name} sends responses elsewhere: it is not asked")
            elif use in built_in_scorers() and use != "lm_eval":  # tasks may bring code
                scorers[name] = table
            else:
                left_out.append(f"scorer {name} brings code of its own: it is not loaded")
        settings["scorers"] = scorers
        if settings.get("chat_template") not in (None, "model", "none"):
            settings.pop("chat_template")
            left_out.append("the chat template is a file: name yours with --chat-template")
        if self.settings.get("trust_remote_code"):
            left_out.append("the model brings code: it runs with --trust-remote-code alone")
        if (base := self.settings.get("base")) is not None:
            if isinstance(base, str) and _HUB_NAME.fullmatch(base):
                settings["base"] = base
            else:
                left_out.append("the adapter's base was a local folder: name yours with --base")
        for place, source in _sources(settings):
            if not _SOURCE.fullmatch(source):
                raise ReproductionError(
                    f"{self.path}: {place} names {source!r}, which is no hub id, built-in set or "
                    "bare file name: a reproduction file may not name paths"
                )
        if self.base.on_hub and _HUB_NAME.fullmatch(self.base.name):
            settings |= {"model": self.base.name, "revision": self.base.revision}
        return settings, tuple(map(plain_line, left_out))

    def kl_tokens_of(self, scorer: str) -> Any:
        """N of a scorer's test scores, as the settings in the file say it."""
        table = _table(_table(self.settings.get("scorers")).get(scorer))
        tokens = _table(table.get("settings")).get("kl_tokens")
        return tokens or self.settings.get("test_kl_tokens") or self.settings.get("kl_tokens")

    def weights_beside(self, names: Mapping[str, Any]) -> bool:
        """Whether the saved model's files, those of `names`, are beside this file, unchanged."""
        paths = {name: self.folder / name for name in names if name in self.files}
        return bool(paths) and all(
            path.is_file() and sha256_file(path) == self.files[name].sha256
            for name, path in paths.items()
        )

    def learned(self) -> bytes | None:
        """The learned operators beside the file; None: the edit has none.

        Raises:
            ReproductionError: they are missing, or are not those that the file names.
        """
        refinement = self.trial.edit.refinement
        if refinement is None:
            return None
        path = self.folder / LEARNED_FILE
        if not path.is_file():
            raise ReproductionError(
                f"{self.path}: the edit was learned, and its operators are not at {str(path)!r}: "
                "download that file too"
            )
        if sha256_file(path) != refinement.sha256:
            raise ReproductionError(f"{str(path)!r} holds other operators than {self.path} names")
        return path.read_bytes()

    def _pinned(self, tables: Any) -> Any:
        """The prompt tables, each dataset of the hub at the commit that was read."""
        pinned = deepcopy(tables)
        for entry in self.prompts:
            of_kind = _table(_table(pinned).get(str(entry.get("kind"))))
            parts = [*_parts(_table(of_kind.get(str(entry.get("use")))))]
            commits = str(entry.get("revision")).split(" + ")
            if len(parts) == len(commits):
                for part, commit in zip(parts, commits, strict=True):
                    if _COMMIT.fullmatch(commit):
                        part["revision"] = commit
        return pinned

    def _found_out(self) -> dict[str, Any]:
        """What the run found out for itself; of an older file, what its command states."""
        if self.calibration:
            return {k: self.calibration[k] for k in _FROM_COMMAND if k in self.calibration}
        try:
            words = shlex.split(self.command)
        except ValueError:
            return {}
        flags = dict(zip(words, words[1:], strict=False))
        stated = {key: flags.get(f"--{key.replace('_', '-')}") for key in _FROM_COMMAND}
        return {key: value for key, value in stated.items() if value is not None}


def read_reproduction(path: Path) -> Reproduction:
    """Read a reproduction file, or the one in a saved model's folder.

    Raises:
        ReproductionError: it is not there, or is not one; says what is wrong with it.
    """
    if path.is_dir():
        paths = [path / name for name in FILE_NAMES]
        folder, path = path, next((file for file in paths if file.is_file()), paths[0])
        if not path.exists():
            raise ReproductionError(f"{folder}: no folder of a saved model: no {path.name} in it")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ReproductionError(f"{path}: too large for a reproduction file")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ReproductionError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ReproductionError(f"{path}: not a JSON file") from error
    if not isinstance(content, dict) or "trial" not in content:
        raise ReproductionError(f"{path}: not a reproduction file")
    try:
        return Reproduction.model_validate({**content, "path": path})
    except (ValidationError, ValueError, RecursionError) as error:
        raise ReproductionError(f"{path}: {_problem(error)}") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return plain_line(str(error))
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return plain_line(f"{place}: {first['msg']}, got {first['input']!r}")


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _parts(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A prompt table, then those of its further sources."""
    yield table
    further = table.get("more")
    for part in further if isinstance(further, list) else ():
        yield from _parts(_table(part))


def _sources(value: Any, place: str = "settings") -> Iterator[tuple[str, str]]:
    """Every prompt source below a value, with where it stands."""
    if isinstance(value, list):
        for entry in value:
            yield from _sources(entry, place)
    for key, entry in _table(value).items():
        if key in ("source", "more") and isinstance(entry, str):  # settings read JSON text
            yield f"{place}.{key}", entry
        else:
            yield from _sources(entry, f"{place}.{key}")
