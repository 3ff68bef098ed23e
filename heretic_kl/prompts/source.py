"""Where prompts come from, defined once for settings, scorers and commands. Loads nothing."""

import dataclasses
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints
from pydantic.dataclasses import dataclass

Text = Annotated[str, StringConstraints(min_length=1)]
_config = ConfigDict(extra="forbid", defer_build=True)


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


@dataclass(frozen=True, config=_config)
class DatasetSpec(PromptSource):
    """A `PromptSource` that names its source, so that it can be loaded.

    Raises:
        ValidationError: the source is empty, or the limit below 1 (a `ValueError`).
    """

    source: Text = dataclasses.field()

    def describe(self) -> str:
        """Return the source and the part of it, for people: `org/set train[:400], column text`."""
        split = "" if self.split is None else f" {self.split}"
        column = "" if self.column is None else f", column {self.column}"
        limit = "" if self.limit is None else f", at most {self.limit}"
        subset = "" if self.subset is None else f" ({self.subset})"
        return f"{self.source}{subset}{split}{column}{limit}"
