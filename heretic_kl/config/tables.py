"""The tables of the settings: prompts, directions, edit, scorers. Reads nothing.

Field types and `setting` here serve the settings of all commands.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

from heretic_kl.files import expanded, is_file_name
from heretic_kl.prompts.source import PromptSource
from heretic_kl.prompts.source import Text as Text


def _no_bool(value: object) -> object:
    # pydantic reads true as the number 1; `seed = true` is a slip, not a seed.
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "a truth value is not a number")
    return value


def _no_empty_path(value: object) -> object:
    # Path("") is the current folder: never what an empty string meant.
    if value == "":
        raise PydanticCustomError("empty_path", "an empty path")
    if "\0" in str(value) or str(expanded(str(value))).startswith("~"):
        raise PydanticCustomError("expected", "a path without NUL, its ~ that of a user")
    return value


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise PydanticCustomError("expected", "a name that a file could have, without folders")
    return name


def array(value: object) -> object:
    """Read a list from text: a JSON array, or one item."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [value]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise PydanticCustomError("expected", "valid JSON") from None


def words(value: object) -> object:
    """Read a list from text: a JSON array, or words with commas between them."""
    items = array(value)
    if not isinstance(value, str) or not isinstance(items, list):
        return items
    return [word.strip() for item in items for word in str(item).split(",") if word.strip()]


Component = Literal["attention", "mlp"]
Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Location = Annotated[Path, BeforeValidator(_no_empty_path), AfterValidator(expanded)]
Name = Annotated[Text, AfterValidator(_file_name)]


def safetensors_path(path: Path) -> Path:
    """Check the suffix of a file that is written by safetensors."""
    if path.suffix.lower() != ".safetensors":
        raise PydanticCustomError("expected", "a path that ends in .safetensors")
    return path


Tensors = Annotated[Location, AfterValidator(safetensors_path)]


def setting(
    default: Any,
    description: str,
    *,
    example: Any = None,
    metavar: str = "",
    short: str = "",
    bare: str = "",
    **limits: Any,
) -> Any:
    """Return a field with its documentation.

    Args:
        default: its value where nobody sets it.
        description: one sentence without a full stop.
        example: a value to show where the default is None.
        metavar: what stands for the value in `--help`.
        short: one letter, for the flag `-x`; or another name than the field's for the flag.
        bare: the value that the flag alone stands for.
        limits: `ge`, `gt`, `le`.
    """
    extra: dict[str, Any] = {"metavar": metavar, "short": short, "bare": bare}
    examples = None if example is None else [example]
    return Field(
        default, description=description, examples=examples, json_schema_extra=extra, **limits
    )


def json_file() -> Any:
    """The setting of every command that can write its results as JSON."""
    return setting(
        None,
        "Write everything as JSON to a file, or to stdout (-) in place of the tables",
        metavar="FILE",
        short="json",
    )


class _Table(BaseModel):
    """A frozen table that rejects unknown keys, built only when first used (for `--help`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class PromptKindTable(_Table):
    """The three uses of one kind, which hold different prompts."""

    train: PromptSource = PromptSource()
    validation: PromptSource = PromptSource()
    test: PromptSource = PromptSource()


class PromptsTable(_Table):
    """Which prompts are used, per kind and use."""

    harmful: PromptKindTable = PromptKindTable.model_construct()
    harmless: PromptKindTable = PromptKindTable.model_construct()
    borderline: PromptKindTable = PromptKindTable.model_construct()


class DirectionsTable(_Table):
    """How the directions are computed from residuals."""

    by_response: bool = setting(True, "Compare refused harmful with answered harmless prompts")
    project_off_harmless: bool = setting(
        False, "Remove from each its part along the mean harmless prompt"
    )
    winsorize_quantile: Number = setting(
        1.0, "Clip residuals at this quantile of magnitudes (1: off)", gt=0, le=1
    )


class EditTable(_Table):
    """Which edits are searched."""

    norm: Literal["none", "row", "normalized_row"] = setting(
        "none", "Weight norm that the edit keeps"
    )
    components: Annotated[tuple[Component, ...], NoDecode, BeforeValidator(words)] = setting(
        ("attention", "mlp"),
        "Modules to edit: attention, mlp (and experts)",
        metavar="LIST",
    )
    layers: Text | None = setting(
        None,
        "Path of the list of layers (default: found by running the model)",
        example="model.language_model.layers",
        metavar="PATH",
    )
    sites: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(words)] = setting(
        (),
        "Patterns of module paths in a layer (default: all sites)",
        example=["*.o_proj", "mlp.down_proj"],
        metavar="LIST",
    )

    @field_validator("components")
    @classmethod
    def _some_components(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise PydanticCustomError("expected", "at least one of attention, mlp, each once")
        return value


class RefinementTable(_Table):
    """How edits are learned after the search."""

    trials: Whole = setting(3, "Edits to learn, each starting from the one before", ge=0)
    steps: Whole = setting(100, "Optimizer steps for each", ge=1, le=50_000)
    form: Literal["strength", "direction", "factors"] = setting("direction", "Learned at each site")
    rank: Whole = setting(1, "Rank, where form is factors", ge=1, le=1024)
    kl_tokens: Whole = setting(16, "Positions of the response in the loss", ge=1, le=1024)
    mass_limit: Number = setting(
        0.05, "Probability of opening with a refusal to aim at first", ge=1e-4, le=1
    )
    beta_kl: Number | None = setting(
        None,
        "Fixed weight of the KL (default: dual ascent)",
        example=10.0,
        gt=0,
    )
    kl_temperature: Number = setting(1.0, "Temperature of the KL in the loss", gt=0)
    gradient_checkpointing: bool = setting(
        False, "Recompute layers in the backward pass, to save memory"
    )

    @property
    def learning(self) -> dict[str, Any]:
        """What decides which edit is learned, by name: not how many, nor in how much memory."""
        return self.model_dump(exclude={"trials", "gradient_checkpointing"})


class ScorerTable(_Table):
    """One scorer: what it measures is in its plug-in."""

    use: Text | None = setting(
        None,
        "Plug-in: a short name or path/to/file.py:Class (default: the scorer's name)",
        example="path/to/file.py:MyScorer",
        metavar="PLUGIN",
    )
    role: Literal["minimize", "maximize", "monitor"] = setting(
        "minimize", "An objective of the search, or only shown (monitor)"
    )
    enabled: bool = setting(True, "Use the scorer")
    settings: dict[str, Any] = Field(
        default_factory=dict, description="The scorer's own settings; the scorer checks them"
    )
