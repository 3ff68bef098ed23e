"""The tables of the settings: prompts, directions, edit, scorers. Reads nothing.

Field types and `setting` here serve `config.Settings` too.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
)
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError


def _no_bool(value: object) -> object:
    # pydantic reads true as the number 1; `seed = true` is a slip, not a seed.
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "a truth value is not a number")
    return value


def _no_empty_path(value: object) -> object:
    # Path("") is the current folder: never what an empty string meant.
    if value == "":
        raise PydanticCustomError("empty_path", "an empty path")
    return value


Text = Annotated[str, StringConstraints(min_length=1)]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Location = Annotated[Path, BeforeValidator(_no_empty_path), AfterValidator(Path.expanduser)]


def setting(
    default: Any, description: str, *, group: str = "", example: Any = None, **limits: Any
) -> Any:
    """Return a field whose description, group and example are its documentation."""
    extra: JsonDict = {"group": group}
    examples = None if example is None else [example]
    return Field(
        default, description=description, examples=examples, json_schema_extra=extra, **limits
    )


class _Table(BaseModel):
    """A frozen table that refuses unknown keys, built only when first used (for `--help`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class PromptTable(_Table):
    """Where the prompts of one use come from."""

    source: Text | None = setting(
        None,
        "Prompts to use instead of the prompt set's: builtin:harmful, builtin:harmless, a hub "
        "dataset id, a dataset folder, or a .txt, .jsonl, .json, .csv or .parquet file",
        example="my_prompts.txt",
    )
    split: Text | None = setting(
        None, "Split, with an optional slice (default: the only one)", example="train[:400]"
    )
    column: Text | None = setting(
        None, "Column of the prompts (default: text, or the only text column)", example="text"
    )
    prefix: str = setting("", "Put before every prompt")
    suffix: str = setting("", "Put after every prompt")
    system: str | None = setting(None, "System prompt", example="You are a helpful assistant.")
    limit: Whole | None = Field(
        None, ge=1, description="Use at most this many prompts", examples=[100]
    )


class PromptKindTable(_Table):
    """The three disjoint uses of one kind of prompt."""

    train: PromptTable = setting(PromptTable.model_construct(), "find the directions")
    validation: PromptTable = setting(PromptTable.model_construct(), "measure every trial")
    test: PromptTable = setting(PromptTable.model_construct(), "measure the final trials only")


class PromptsTable(_Table):
    """Which prompts are used, per kind and use."""

    harmful: PromptKindTable = setting(
        PromptKindTable.model_construct(), "prompts that draw the behaviour to remove"
    )
    harmless: PromptKindTable = setting(
        PromptKindTable.model_construct(), "prompts whose answers must not change"
    )


class DirectionsTable(_Table):
    """How the directions are computed from residuals."""

    project_off_harmless: bool = setting(
        False, "Take out of each direction what it shares with the mean of the harmless prompts"
    )
    winsorize_quantile: Number = Field(
        1.0,
        gt=0,
        le=1,
        description="Clip each prompt's residual to this quantile of its magnitudes before "
        "averaging (1: no clipping)",
    )


class EditTable(_Table):
    """Which edits are searched."""

    norm: Literal["none", "row", "normalized_row"] = setting(
        "none",
        "What keeps its norm: none; row ablates and then restores the norms of the weight's "
        "rows; normalized_row normalizes, ablates and restores, and leaves more of the direction",
    )
    components: tuple[Literal["attention", "mlp"], ...] = setting(
        ("attention", "mlp"),
        "Which modules may be edited: those that mix tokens (attention, state space, "
        "convolution), those that do not (MLP, experts)",
    )
    layers: Text | None = setting(
        None,
        "Path of the model's list of layers (default: found by running the model)",
        example="model.language_model.layers",
    )
    sites: tuple[Text, ...] = setting(
        (),
        "Patterns of module paths inside a layer, to look only there for what writes to the "
        "residual stream (default: everywhere); all that writes must be among them",
        example=["*.o_proj", "mlp.down_proj"],
    )

    @field_validator("components")
    @classmethod
    def _some_components(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise PydanticCustomError("components", "at least one of attention, mlp, each once")
        return value


class ScorerTable(_Table):
    """One scorer: what it measures is in its plug-in."""

    use: Text | None = setting(
        None,
        "Plug-in: a short name, or path/to/file.py:Class (default: the scorer's own name)",
        example="path/to/file.py:MyScorer",
    )
    role: Literal["minimize", "maximize", "monitor"] = setting(
        "minimize", "An objective of the search (minimize, maximize), or shown only (monitor)"
    )
    enabled: bool = setting(True, "false leaves the scorer out")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="The scorer's own settings, checked by the scorer"
    )
