"""Where prompts come from, defined once for settings, scorers and commands. Loads nothing."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
_config = ConfigDict(extra="forbid", defer_build=True)


def _revision(text: str) -> str:
    if not re.fullmatch(r"\w[\w+-]*([./][\w+-]+)*", text):  # a cache makes a path of it
        raise PydanticCustomError("expected", "a commit, tag or branch")
    return text


Revision = Annotated[Text, AfterValidator(_revision)]
_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")


def _further_sources(value: object) -> object:
    """Read JSON text; say which entry of a list is wrong, and what of it."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list | tuple) or not all(map(_is_table, value)):
        raise PydanticCustomError("expected", "a list of tables, each with a source")
    tables = [_table(entry) for entry in value]
    for number, table in enumerate(tables, 1):
        try:
            TypeAdapter(DatasetSpec).validate_python(table)
        except ValidationError as error:
            details = error.errors(include_url=False)
            detail = next((d for d in details if d["type"] in _UNKNOWN), details[0])
            raise PydanticCustomError(
                "expected",
                "a list of tables, each with a source (number {number}, {key}: {problem})",
                {
                    "number": number,
                    "key": ".".join(map(str, detail["loc"])),
                    "problem": "unknown setting"
                    if detail["type"] in _UNKNOWN
                    else detail["msg"][:1].lower() + detail["msg"][1:],
                },
            ) from None
    return tables


def _table(entry: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(entry):
        return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    return dict(entry)


def _is_table(entry: Any) -> bool:
    return isinstance(entry, Mapping) or dataclasses.is_dataclass(entry)


@dataclass(frozen=True, config=_config)
class PromptSource:
    """A source, a part of it, and what is put around each prompt; unset fields are None."""

    source: Text | None = Field(
        default=None,
        description="File (.txt, .jsonl, .json, .csv, .parquet), folder, hub id, builtin:NAME",
    )
    split: Text | None = Field(
        default=None, description="Split, with an optional slice: train[:400]"
    )
    column: Text | None = Field(default=None, description="Column of the prompts")
    prefix: str = Field(default="", description="Text before every prompt")
    suffix: str = Field(default="", description="Text after every prompt")
    system: str | None = Field(default=None, description="System prompt")
    limit: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Use at most this many prompts"
    )
    subset: Text | None = Field(default=None, description="Subset of the dataset, its config name")
    revision: Revision | None = Field(
        default=None,
        description="Commit, tag or branch of a hub dataset",
        exclude_if=lambda revision: revision is None,  # older studies and files have no such key
    )
    more: Annotated[tuple[dict[str, Any], ...], NoDecode, BeforeValidator(_further_sources)] = (
        Field(
            default=(),
            description="Further sources of the same set, each a table like this one",
            json_schema_extra={"metavar": "JSON"},
        )
    )


@dataclass(frozen=True, config=_config)
class DatasetSpec(PromptSource):
    """A `PromptSource` that names its source, so that it can be loaded.

    Raises:
        ValidationError: the source is empty, or the limit below 1 (a `ValueError`).
    """

    source: Text = dataclasses.field()

    def parts(self) -> "tuple[DatasetSpec, ...]":
        """This source alone, then every further one.

        Raises:
            ValidationError: a further source has no `source` (a `ValueError`).
        """
        further = [part for table in self.more for part in DatasetSpec(**table).parts()]
        return (dataclasses.replace(self, more=()), *further)

    def describe(self) -> str:
        """Return the source and the part of it, for people: `org/set train[:400], column text`."""
        if self.more:
            return " + ".join(part.describe() for part in self.parts())
        split = "" if self.split is None else f" {self.split}"
        column = "" if self.column is None else f", column {self.column}"
        limit = "" if self.limit is None else f", at most {self.limit}"
        subset = "" if self.subset is None else f" ({self.subset})"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.source}{revision}{subset}{split}{column}{limit}"
