"""What a user can set. Knows nothing about models, torch or scorers' insides; reads nothing.

`Settings(...)` takes its arguments and code defaults alone; `load_settings` reads the world.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from heretic_kl.config.tables import (
    DirectionsTable,
    EditTable,
    Location,
    Name,
    Number,
    PromptsTable,
    RefinementTable,
    ScorerTable,
    Text,
    Whole,
    setting,
)

DEFAULT_SCORERS: dict[str, dict[str, Any]] = {
    "refusals": {"role": "minimize"},
    "teacher_forced_kl": {"role": "minimize"},
    "false_refusals": {"role": "monitor"},
}
KL_TOKENS = "Response positions over which the KL is averaged (1: first token)"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_SET_BY_US = {
    *("add_generation_prompt", "chat_template", "continue_final_message", "conversation"),
    *("messages", "padding", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs"),
    *("max_length", "truncation", "return_assistant_tokens_mask"),
}
"""Names of `apply_chat_template`'s own arguments, which are no variables of a template."""
_sources: ContextVar[tuple[Mapping[str, Any], ...]] = ContextVar("_sources", default=())


@contextmanager
def settings_from(*sources: Mapping[str, Any]) -> Iterator[None]:
    """Have settings that are built meanwhile take values from `sources`, the first one first."""
    token = _sources.set(sources)
    try:
        yield
    finally:
        _sources.reset(token)


def moved(
    headings: Mapping[str, tuple[str, ...]], heading: str, names: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """Headings of a help with some settings moved to the first place below one of them."""
    rest = {title: tuple(n for n in below if n not in names) for title, below in headings.items()}
    return {**rest, heading: (*names, *rest.get(heading, ()))}


class ProgramSettings(BaseSettings):
    """What every command takes, and where its settings come from."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", defer_build=True)
    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """The settings below each heading of the help, in order; `--help` shows the first headings."""
    shown_first: ClassVar[tuple[str, ...]] = ("Basics",)
    lowest: ClassVar[Mapping[str, Any]] = {}
    """Values below every source; tables are merged with them."""
    everywhere: ClassVar[frozenset[str]] = frozenset()
    """Settings of a search that this command takes from the environment and files too."""

    quiet: bool = setting(False, "Show results, notices and errors only", short="q")
    debug: bool = setting(False, "Show tracebacks: of internal errors and of failed trials")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then what `settings_from` gives, then `lowest`; nothing from the world."""
        layers = (deepcopy(dict(values)) for values in (*_sources.get(), cls.lowest))
        return (init_settings, *(InitSettingsSource(settings_cls, layer) for layer in layers))


class CommonSettings(ProgramSettings):
    """What means the same in every command that runs a model."""

    kl_tokens: Whole = setting(3, KL_TOKENS, ge=1, le=1024, short="t")
    device: Text = setting(
        "auto",
        "auto, cpu, cuda, cuda:1, mps or another device of torch",
        metavar="DEVICE",
        short="d",
    )
    dtype: Dtype = setting("auto", "Type of the weights; auto tries them by a forward pass")
    base: Text | None = setting(
        None,
        "Base model of an adapter (default: the one that it names)",
        example="path/to/base",
        metavar="MODEL",
    )
    trust_remote_code: bool = setting(False, "Run Python code that comes with the model")
    chat_template: Text = setting(
        "model", "model (the tokenizer's own), none (plain text) or a Jinja file", metavar="FILE"
    )
    enable_thinking: bool | None = setting(
        None, "Thinking, where the chat template has a switch (default: off)", example=False
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, "Further variables for the chat template", metavar="JSON"
    )
    device_map: Text | None = setting(
        None, "Spread a large model over devices, as accelerate does", example="auto", metavar="MAP"
    )
    threads: Whole = setting(0, "CPU threads (0: torch's default)", ge=0, le=1024)

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template is told beside the messages."""
        switch = {} if self.enable_thinking is None else {"enable_thinking": self.enable_thinking}
        return {**self.chat_template_kwargs, **switch}

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_of_the_user(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_SET_BY_US & value.keys())
        if taken:
            raise PydanticCustomError("expected", "a table without " + ", ".join(taken))
        return value


class Settings(CommonSettings):
    """Everything a user can set for a search; frozen: what a run finds out lives elsewhere."""

    lowest: ClassVar[Mapping[str, Any]] = {"scorers": DEFAULT_SCORERS}
    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Basics": (
            *("model", "trials", "minutes", "refine", "kl_tokens", "pick", "save", "save_as"),
            *("device", "dtype", "quantization", "prompt_set", "seed", "study_dir", "quiet"),
        ),
        "Model": (
            *("base", "revision", "trust_remote_code", "chat_template", "enable_thinking"),
            *("chat_template_kwargs", "response_prefix"),
        ),
        "Search": (
            *("target_refusals", "max_response_tokens", "startup_trials", "test_trials"),
            *(
                "test_kl_tokens",
                "screening",
                "racing",
                "keep_responses",
                "storage",
                "study_name",
                "debug",
            ),
        ),
        "Saving": ("save_dtype", "overwrite"),
        "Prompts": ("prompts",),
        "Directions": ("directions",),
        "Edit": ("edit",),
        "Refinement": ("refinement",),
        "Scorers": ("scorers",),
        "Performance": (
            *(
                "batch_size",
                "parallel_candidates",
                "workers",
                "cache_memory_mb",
                "device_map",
                "threads",
            ),
        ),
    }

    model: Text | None = setting(
        None,
        "Hub id, local folder, .gguf file or folder of a PEFT adapter (required)",
        example="Qwen/Qwen3-4B-Instruct-2507",
        metavar="MODEL",
        short="m",
    )
    trials: Whole = setting(
        200, "Number of finished trials at which the search ends", ge=0, short="n"
    )
    pick: Text | None = setting(
        None,
        "Pick by rule: knee, trial=17, likely-refusals=0.05, max-OTHER=0.9",
        example="knee",
        metavar="RULE",
        short="p",
    )
    save: Location | None = setting(
        None,
        "Save the picked model to this folder",
        example="edited-model",
        metavar="FOLDER",
        short="o",
    )
    save_as: Literal["merged", "lora"] = setting("merged", "Save a whole model, or a LoRA adapter")
    quantization: Literal["none", "bnb_4bit", "bnb_8bit"] = setting(
        "none", "Search on quantized weights, to fit a small GPU; saved in full precision"
    )
    prompt_set: Literal["auto", "hub", "builtin"] = setting(
        "auto", "Prompts if prompts.* names none; auto: hub if reachable, else builtin"
    )
    seed: Whole = setting(0, "Seed of all random numbers", ge=0, le=2**32 - 1, short="s")
    study_dir: Location = setting(Path("studies"), "Folder of the studies", metavar="FOLDER")

    revision: Text | None = setting(
        None, "Branch, tag or commit of a hub model", example="main", metavar="NAME"
    )
    response_prefix: str | None = setting(
        None, "Start of every response (default: detected; empty: none)", example="<think></think>"
    )
    max_response_tokens: Whole = setting(100, "Longest response generated to count refusals", ge=1)
    minutes: Number | None = setting(
        None,
        "Time for the search (a fifth of it) and refinement together",
        example=5.0,
        gt=0,
    )
    refine: bool = setting(True, "Learn edits by gradient after the search")
    target_refusals: Number = setting(
        0.05, "Share of refusals that is acceptable; refinement aims at it", ge=0, le=1
    )
    startup_trials: Whole = setting(
        11, "Trials before the sampler learns: good starts, then random", ge=0
    )
    test_trials: Whole = setting(
        8, "Trials of the front that are measured on the test prompts", ge=0
    )
    test_kl_tokens: Whole | None = setting(
        None,
        "Positions of the KL on test prompts (default: kl_tokens)",
        example=16,
        ge=1,
        le=1024,
    )
    screening: bool | None = setting(
        None,
        "Only promising trials respond (default: if edits are learned)",
        example=False,
    )
    racing: bool = setting(True, "Stop a trial as soon as a finished one is certain to beat it")
    keep_responses: Literal["none", "report", "harmless", "all"] = setting(
        "report", "Which responses a run keeps"
    )
    storage: Text | None = setting(
        None,
        "Optuna storage URL (default: a journal file in study_dir)",
        example="sqlite:///studies.db",
        metavar="URL",
    )
    study_name: Name | None = setting(
        None,
        "Name of the study (default: from the model and the settings)",
        example="my-study",
        metavar="NAME",
    )
    save_dtype: Literal["source", "float32", "bfloat16", "float16"] = setting(
        "source", "Dtype to save in; source: unchanged"
    )
    overwrite: bool = setting(False, "Save into a folder that is not empty")

    batch_size: Whole = setting(0, "Prompts run together (0: measured)", ge=0)
    parallel_candidates: Whole = setting(
        1, "Candidates measured side by side in one batch", ge=1, le=64
    )
    workers: Whole = setting(1, "Processes that search (0: one a GPU); CPUs are shared", ge=0)
    cache_memory_mb: Whole = setting(
        1024, "Memory for what is the same in every trial (0: off)", ge=0
    )

    prompts: PromptsTable = PromptsTable.model_construct()
    directions: DirectionsTable = DirectionsTable.model_construct()
    edit: EditTable = EditTable.model_construct()
    refinement: RefinementTable = RefinementTable.model_construct()
    scorers: dict[str, ScorerTable] = Field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether edits are learned after the search."""
        return self.refine and self.refinement.trials > 0

    @property
    def other_test_tokens(self) -> int | None:
        """N of the KL on test prompts; None: the same as in trials."""
        return None if self.test_kl_tokens == self.kl_tokens else self.test_kl_tokens

    @property
    def screens(self) -> bool:
        """Whether promising trials alone generate responses."""
        return self.learns if self.screening is None else self.screening

    @field_validator("scorers", mode="before")
    @classmethod
    def _scorer_names_are_plain(cls, value: Any) -> Any:
        for name in map(str, value) if isinstance(value, Mapping) else ():
            # Flags and environment variables show neither case nor the difference of - and _.
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise PydanticCustomError(
                    "whole_line",
                    "a scorer's name is lower-case letters, digits and _, beginning with a "
                    "letter, got '{name}'",
                    {"name": name},
                )
        return value
