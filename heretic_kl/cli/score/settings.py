"""The flags of `heretic-kl score` as checked values. Imports no torch, touches no file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from heretic_kl.config import CommonSettings, read_settings
from heretic_kl.config.reading import given_flags
from heretic_kl.config.settings import Dtype
from heretic_kl.config.tables import Location, Tensors, Text, Whole, array, setting
from heretic_kl.errors import ConfigError
from heretic_kl.kl_options import KLOptions
from heretic_kl.prompts import BUILTIN_SPECS, DatasetSpec, PromptSource

STORED_SUFFIX: Final = ".safetensors"
STDOUT: Final = Path("-")
FIXED_BY_A_STORED_REFERENCE: Final = (
    *("prompts", "batch_size", "chat_template", "enable_thinking", "response_prefix"),
    *("noise_floor", "dtype", "save_reference", "store", *KLOptions.model_fields),
)


class ScoreSettings(CommonSettings, KLOptions):
    """What is measured, how, and where the result goes."""

    model_config = CommonSettings.model_config
    shown_first: ClassVar[tuple[str, ...]] = ("kl_tokens", "prompts", "divergence", "json_file")

    reference: Text | None = setting(
        None,
        "The original, or a file that --save-reference wrote (required)",
        group="Models",
        metavar="MODEL",
        short="r",
        first=True,
    )
    candidate: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(array)] = setting(
        (),
        "What is measured against it; later ones are also compared with the first (required)",
        group="Models",
        metavar="MODEL ...",
        first=True,
    )
    kl_tokens: Whole = setting(
        8,
        "Positions of the response over which the KL is averaged (1: first-token KL)",
        group="What is measured",
        short="t",
        first=True,
        ge=1,
        le=1024,
    )
    prompts: PromptSource = setting(PromptSource(), "", group="What is measured", first=True)
    response_prefix: str = setting("", "Start of every response", group="Model")
    noise_floor: bool = setting(
        True, "Measure what an unchanged model shows", group="What is measured"
    )
    candidate_dtype: Dtype | None = setting(
        None, "Type of the candidates' weights (default: the reference's)", group="Model"
    )
    batch_size: Whole = setting(
        16, "Most sequences at once; halved where memory runs out", group="Performance", ge=1
    )
    json_file: Location | None = setting(
        None,
        "Write everything as JSON to a file, or to stdout (-) in place of the tables",
        group="Output",
        metavar="FILE",
        short="json",
        first=True,
    )
    table: Tensors | None = setting(
        None,
        "Write every prompt and position as .safetensors; several candidates are numbered",
        group="Output",
        metavar="FILE",
        first=True,
    )
    save_reference: Tensors | None = setting(
        None,
        "Keep the reference's side as .safetensors, to measure more candidates without its model",
        group="Output",
        metavar="FILE",
        first=True,
    )
    store: Literal["hidden", "logits"] = setting(
        "hidden",
        "What --save-reference keeps: hidden is small and for candidates with the reference's "
        "head; logits is large and for any",
        group="Output",
    )

    @property
    def name(self) -> str:
        """The reference as the user named it."""
        assert self.reference is not None
        return self.reference

    @property
    def stored(self) -> bool:
        """Whether the reference is a file that --save-reference wrote."""
        path = Path(self.name).expanduser()
        return path.suffix.lower() == STORED_SUFFIX and not path.is_dir()

    @property
    def dataset(self) -> DatasetSpec:
        """Where the prompts come from: by default the built-in harmless test prompts."""
        default = BUILTIN_SPECS["harmless", "test"]
        fields = {name: value for name, value in vars(self.prompts).items() if value is not None}
        if "source" not in fields:
            fields["source"] = default.source
        if fields["source"].startswith("builtin:"):
            fields.setdefault("split", default.split)
        return DatasetSpec(**fields)


def read_score_settings(words: Sequence[str]) -> ScoreSettings:
    """Read the command line after `score`.

    Raises:
        ConfigError: a flag is wrong, missing, or without effect; one line each.
    """
    settings = read_settings(ScoreSettings, words)
    if settings.reference is None:
        raise ConfigError(
            "no reference given: name the original with --reference (a hub id, a folder, a .gguf "
            "file, or what --save-reference wrote)"
        )
    if not settings.candidate:
        raise ConfigError("no candidate given: name what is measured against it with --candidate")
    given = given_flags(ScoreSettings, words)
    if "store" in given and "save_reference" not in given:
        raise ConfigError("--store says how --save-reference writes; give that too, or neither")
    if settings.stored:
        for name in FIXED_BY_A_STORED_REFERENCE:
            if name in given:
                hint = "; candidates have --candidate-dtype" if name == "dtype" else ""
                flag = "--no-noise-floor" if name == "noise_floor" else f"--{name}"
                raise ConfigError(
                    f"{flag.replace('_', '-')} has no effect on a stored reference "
                    f"({settings.reference}): leave it out, or measure from the model itself{hint}"
                )
    return settings
