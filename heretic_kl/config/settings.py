"""What a user can set, and `load_settings`. Knows nothing about models, torch or scorers' insides.

`Settings(...)` takes its arguments and code defaults alone. `load_settings` reads the world:
command line over environment over config file over a preset over code defaults, tables merged.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from heretic_kl.config.keys import allowed, locate, same_name, spell_key
from heretic_kl.config.sources import Layer, argv_layer, environ_layer, file_layer, mapping_layer
from heretic_kl.config.tables import (
    DirectionsTable,
    EditTable,
    Location,
    PromptsTable,
    ScorerTable,
    Text,
    Whole,
    setting,
)
from heretic_kl.errors import ConfigError

DEFAULT_CONFIG_FILE = Path("config.toml")

DEFAULT_SCORERS: dict[str, dict[str, Any]] = {
    "refusals": {"role": "minimize"},
    "teacher_forced_kl": {"role": "minimize"},
    "false_refusals": {"role": "monitor"},
}

_layers: ContextVar[tuple[Layer, ...]] = ContextVar("_layers", default=())


def _default_scorers() -> dict[str, ScorerTable]:
    return {name: ScorerTable.model_validate(table) for name, table in DEFAULT_SCORERS.items()}


class Settings(BaseSettings):
    """Everything a user can set; frozen, so what is found out at run time lives elsewhere."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", defer_build=True)

    model: Text | None = setting(
        None,
        "Hub id, local folder, .gguf file or folder of a PEFT adapter (required)",
        group="Model",
        example="Qwen/Qwen3-4B-Instruct-2507",
    )
    revision: Text | None = setting(
        None, "Branch, tag or commit of a hub model", group="Model", example="main"
    )
    base: Text | None = setting(
        None,
        "Model that an adapter is put on (default: the one it names)",
        group="Model",
        example="path/to/base",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Type of the weights; auto tries them by a forward pass", group="Model"
    )
    quantization: Literal["none", "bnb_4bit", "bnb_8bit"] = setting(
        "none",
        "Search on weights quantized by bitsandbytes as they are loaded, to fit a small GPU; what "
        "is saved is the original in full precision, edited",
        group="Model",
    )
    device: Text = setting(
        "auto", "auto, cpu, cuda, cuda:1, mps or another device of torch", group="Model"
    )
    device_map: Text | None = setting(
        None, "Spread a large model over devices, as accelerate does", group="Model", example="auto"
    )
    trust_remote_code: bool = setting(
        False, "Run Python code that comes with the model", group="Model"
    )
    threads: Whole = setting(0, "CPU threads (0: torch's default)", group="Model", ge=0)

    kl_tokens: Whole = setting(
        3,
        "Positions of the original's answer over which the KL is averaged, in one "
        "teacher-forced pass (1: first-token KL)",
        group="Measurement",
        ge=1,
        le=1024,
    )
    max_response_tokens: Whole = setting(
        100, "Longest answer generated when refusals are counted", group="Measurement", ge=1
    )
    batch_size: Whole = setting(0, "Prompts run together (0: measured)", group="Measurement", ge=0)
    parallel_candidates: Whole = setting(
        1,
        "Candidates measured side by side in one batch; the sampler draws them without knowing "
        "each other's scores",
        group="Measurement",
        ge=1,
        le=64,
    )
    cache_memory_mb: Whole = setting(
        1024,
        "Memory for what every trial needs and none changes: weights laid out for the CPU, what "
        "the unedited model computes below the edited layers, its logits (0: off)",
        group="Measurement",
        ge=0,
    )
    response_prefix: str | None = setting(
        None,
        "Start of every answer (default: detected; empty: none)",
        group="Measurement",
        example="<think></think>",
    )
    chat_template: Text = setting(
        "model",
        "model: the tokenizer's own; none: plain-text prompts, for base models; or a Jinja file",
        group="Measurement",
    )
    enable_thinking: bool | None = setting(
        None,
        "Passed to chat templates that know this switch (default: off there)",
        group="Measurement",
        example=False,
    )
    prompt_set: Literal["auto", "hub", "builtin"] = setting(
        "auto",
        "Prompts of the tables that name no source: hub (mlabonne/harmful_behaviors and "
        "mlabonne/harmless_alpaca, column text, train[:400] to find directions, test[:100] to "
        "measure trials; the test prompts are built in), builtin, or auto: hub where reachable",
        group="Measurement",
    )

    trials: Whole = setting(200, "Finished trials the study holds in the end", group="Search", ge=0)
    startup_trials: Whole = setting(
        60, "Random trials before the sampler (TPE) learns from them", group="Search", ge=0
    )
    racing: bool = setting(
        False,
        "Measure a trial no further once a finished one surely beats it, by exact bounds; it is "
        "recorded as stopped, counts as a trial and is never on the front",
        group="Search",
    )
    test_trials: Whole = setting(
        8, "Trials of the front that are measured again on the test prompts", group="Search", ge=0
    )
    seed: Whole = setting(0, "Seed of everything random", group="Search", ge=0)
    study_dir: Location = setting(Path("studies"), "Folder of the studies", group="Search")
    storage: Text | None = setting(
        None,
        "Optuna storage URL (default: a journal file in study_dir)",
        group="Search",
        example="sqlite:///studies.db",
    )
    study_name: Text | None = setting(
        None,
        "Name of the study (default: from the model and the settings that matter)",
        group="Search",
        example="my-study",
    )
    quiet: bool = setting(False, "Show results and errors only", group="Search")

    pick: Text | None = setting(
        None,
        "Choose a trial without asking: knee, max-refusals=0.05, trial=17",
        group="Result",
        example="knee",
    )
    save: Location | None = setting(
        None, "Save the chosen model to this folder", group="Result", example="edited-model"
    )
    save_as: Literal["merged", "lora"] = setting(
        "merged", "A whole model, or a LoRA adapter", group="Result"
    )
    save_dtype: Literal["source", "float32", "bfloat16", "float16"] = setting(
        "source", "Type of the saved weights; source: that of the original", group="Result"
    )
    overwrite: bool = setting(False, "Save into a folder that is not empty", group="Result")

    prompts: PromptsTable = setting(PromptsTable.model_construct(), "", group="Prompts")
    directions: DirectionsTable = setting(DirectionsTable.model_construct(), "", group="Directions")
    edit: EditTable = setting(EditTable.model_construct(), "", group="Edit")
    scorers: dict[str, ScorerTable] = Field(
        default_factory=_default_scorers, json_schema_extra={"group": "Scorers"}
    )

    @field_validator("scorers", mode="before")
    @classmethod
    def _scorer_names_differ(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        seen: dict[str, str] = {}
        for name in map(str, value):
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
                raise PydanticCustomError(
                    "scorer_name",
                    "a scorer's name is letters, digits, - and _, beginning with a letter, "
                    "got '{name}'",
                    {"name": name},
                )
            other = seen.setdefault(same_name(name), name)
            if other != name:
                raise PydanticCustomError(
                    "scorer_name",
                    "scorers '{other}' and '{name}' have one name (case, - and _ do not count)",
                    {"name": name if name not in DEFAULT_SCORERS else other, "other": other},
                )
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the layers of a running `load_settings`, then the default scorers.

        pydantic-settings' own environment source is left out: it ignores unknown variables.
        """
        layers = (*_layers.get(), mapping_layer({"scorers": DEFAULT_SCORERS}, "the defaults"))
        return (init_settings, *(_LayerSource(settings_cls, layer) for layer in layers))


class _LayerSource(PydanticBaseSettingsSource):
    """One `Layer` as a source: pydantic-settings merges them, deeply, first one first."""

    def __init__(self, settings_cls: type[BaseSettings], layer: Layer) -> None:
        super().__init__(settings_cls)
        self._values = layer.values

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return a top-level value, its key, and False: values are parsed already."""
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        """Return this source's values."""
        return deepcopy(dict(self._values))


def load_settings(
    argv: Sequence[str] = (),
    *,
    defaults: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Read the settings: command line > environment > config file > `defaults` > code defaults.

    Args:
        argv: Flags without the program's name and command; `--config FILE` names the file,
            without it `config.toml` in the current folder is read where there is one.
        defaults: A preset below the config file, nested as in the file.
        environ: Environment variables, `os.environ` by default; only `HERETIC_KL_*` are read.

    Raises:
        ConfigError: With one line for each key or value that is wrong, and where it came from.
    """
    problems: list[str] = []
    flags = argv_layer(Settings, argv, problems)
    file = flags.config_file or (DEFAULT_CONFIG_FILE if DEFAULT_CONFIG_FILE.exists() else None)
    lower = [mapping_layer({"scorers": DEFAULT_SCORERS}, "the defaults")]
    if defaults is not None:
        lower.insert(0, mapping_layer(defaults, "the preset", Settings, problems))
    if file is not None:
        lower.insert(0, file_layer(Settings, file, problems))
    variables = os.environ if environ is None else environ
    lower.insert(0, environ_layer(Settings, variables, lower, problems))
    layers = (flags.with_scorer_names_of(lower), *lower)
    if problems:
        raise ConfigError("\n".join(problems))
    try:
        with _reading(layers):
            return Settings()
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, layers))) from None


@contextmanager
def _reading(layers: tuple[Layer, ...]) -> Iterator[None]:
    token = _layers.set(layers)
    try:
        yield
    finally:
        _layers.reset(token)


def _explain(error: ValidationError, layers: tuple[Layer, ...]) -> list[str]:
    """One line per wrong setting: its name, what is allowed, its value, its source."""
    lines: dict[tuple[str, ...], str] = {}
    for detail in error.errors(include_url=False):
        location = tuple(str(part) for part in detail["loc"])
        if detail["type"] == "scorer_name":
            source = _origin(("scorers", detail["ctx"]["name"]), layers)
            lines.setdefault(location, f"{detail['msg']} ({source})")
            continue
        found = locate(Settings, location)
        path = location[: found.depth]
        expected = allowed(found.field) if found.field is not None else "a table"
        if detail["type"] == "components":
            expected = detail["msg"]
        source, value = _origin(path, layers), _value(path, layers, detail["input"])
        lines.setdefault(
            path, f"{spell_key(path)} must be {expected}, got {_shown(value)} ({source})"
        )
    return list(lines.values())


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _origin(path: tuple[str, ...], layers: tuple[Layer, ...]) -> str:
    return next((layer.origin(path) for layer in layers if layer.has(path)), "the defaults")


def _value(path: tuple[str, ...], layers: tuple[Layer, ...], otherwise: Any) -> Any:
    return next((layer.get(path) for layer in layers if layer.has(path)), otherwise)
