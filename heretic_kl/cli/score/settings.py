"""The flags of `heretic-kl score` as checked values. Imports no torch, touches no file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from heretic_kl.config import CommonSettings, read_settings
from heretic_kl.config.flag_parser import given_flags
from heretic_kl.config.settings import KL_TOKENS, Dtype
from heretic_kl.config.tables import Location, Tensors, Text, Whole, array, json_file, setting
from heretic_kl.errors import ConfigError
from heretic_kl.files import expanded
from heretic_kl.kl_options import KLOptions
from heretic_kl.prompts import BUILTIN_SPECS, DatasetSpec, PromptSource, spec_of

CacheType = Literal["f16", "f32", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0"]
STORED_SUFFIX: Final = ".safetensors"
FIXED_BY_A_STORED_REFERENCE: Final = (
    *("prompts", "batch_size", "chat_template", "enable_thinking", "response_prefix"),
    *("noise_floor", "bands", "refusal_prompts", "dtype", "save_reference", "store"),
    *("chat_template_kwargs", "write_llama_base"),
    *KLOptions.model_fields,
)

UNUSED_OVER_TEXT: Final = (
    *("prompts", "kl_tokens", "response", "position_decay", "chat_template", "enable_thinking"),
    *("chat_template_kwargs", "response_prefix", "refusal_prompts"),
)
USED_OVER_TEXT: Final = ("context", "stride", "text_column")
WHOLE_ALONE: Final = (
    *("divergence", "temperature", "bands", "refusal_prompts"),
    *("ranking", "plot", "hub_metadata"),
)
"""What a lower bound has no part in."""


class ScoreSettings(CommonSettings, KLOptions):
    """What is measured, how, and where the result goes."""

    model_config = CommonSettings.model_config
    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Models": ("reference", "candidate", "chain"),
        "What is measured": (
            *("kl_tokens", "prompts", "divergence", "temperature", "position_decay"),
            *("response", "noise_floor", "bands", "refusal_prompts", "text"),
            *("context", "stride", "text_column"),
        ),
        "Output": (
            *("worst", "json_file", "table", "ranking", "plot", "html", "hub_metadata"),
            *(
                "hub_dataset",
                "lm_eval",
                "save_reference",
                "store",
                "write_llama_base",
                "quiet",
                "debug",
            ),
        ),
        "Loading": (
            *("device", "dtype", "candidate_dtype", "base", "trust_remote_code"),
            *("chat_template", "enable_thinking", "response_prefix", "backend"),
            *("chat_template_kwargs", "gguf_cache_type", "reference_cache_type"),
            *("key_variable", "top_logprobs"),
        ),
        "Performance": ("batch_size", "device_map", "threads"),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Models", "What is measured", "Output")

    reference: Text | None = setting(
        None,
        "The original, a file that --save-reference wrote, or llama.cpp's base logits (required)",
        metavar="MODEL",
        short="r",
    )
    candidate: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(array)] = setting(
        (),
        "What is measured against it; later ones are also compared with the first; ID@REVISION is "
        "of the hub, URL#NAME is model NAME of a server at http://HOST/v1 (required)",
        metavar="MODEL ...",
    )
    chain: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(array)] = setting(
        (),
        "In place of both: an original and what was made of it, step by step; every pair is "
        "measured, and whether the steps' costs add",
        metavar="MODEL ...",
    )
    kl_tokens: Whole = setting(8, KL_TOKENS, ge=1, le=1024, short="t")
    prompts: PromptSource = PromptSource()
    text: Annotated[tuple[Location, ...], NoDecode, BeforeValidator(array)] = setting(
        (),
        "Measure over the text of these files (.txt, .jsonl, .csv, .parquet, any plain text) "
        "instead of responses; a column named category groups the rows of a table",
        metavar="FILE ...",
    )
    context: Whole = setting(512, "Tokens of each window of the text", ge=2)
    stride: Whole = setting(
        256, "Tokens at the end of each window that are scored; windows begin so far apart", ge=1
    )
    text_column: Text | None = setting(
        None, "Column of the text in tables (default: text, or the only one of strings)"
    )
    noise_floor: bool = setting(True, "Measure what an unchanged model shows")
    bands: bool = setting(
        False, "Measure the reference with its own weights rounded to 8, 6, 5, 4 and 3 bits"
    )
    refusal_prompts: Text | None = setting(
        None,
        "Split the KL into that of refusing or not and the rest; how the reference refuses is "
        "found on these prompts: builtin:harmful, a file, a hub id",
        metavar="SOURCE",
    )
    worst: Whole = setting(0, "Show so many of the worst prompts and positions", ge=0, le=1000)
    json_file: Location | None = json_file()
    table: Tensors | None = setting(
        None,
        "Write every prompt and position as .safetensors; several candidates are numbered",
        metavar="FILE",
    )
    ranking: Location | None = setting(
        None,
        "Write the candidates in order of their KL, with size and bits per weight, as .csv or .md",
        metavar="FILE",
    )
    plot: Location | None = setting(
        None, "Draw KL against size on disk, with the Pareto line, as .png or .svg", metavar="FILE"
    )
    html: Location | None = setting(
        None, "Write everything that is shown, and the plot, as a page", metavar="FILE"
    )
    hub_metadata: Location | None = setting(
        None,
        "Write the KL for the hub: .md is front matter of a model card, .yaml a file for "
        ".eval_results, .json results as of lm-evaluation-harness; several candidates are numbered",
        metavar="FILE",
    )
    hub_dataset: Text | None = setting(
        None,
        "Dataset of the hub that has what is measured on, for --hub-metadata FILE.yaml; needed "
        "where --prompts is not one, and over text",
        metavar="OWNER/NAME",
    )
    lm_eval: Location | None = setting(
        None,
        "Results of lm-evaluation-harness for the candidate, which --hub-metadata FILE.json joins",
        metavar="FILE",
    )
    save_reference: Tensors | None = setting(
        None,
        "Keep the reference's side as .safetensors, to measure more candidates without its model",
        metavar="FILE",
    )
    store: Literal["hidden", "head", "logits"] = setting(
        "hidden",
        "What --save-reference keeps: hidden is small and for candidates with the reference's "
        "head; head adds that, for any candidate; logits is large, rounded, and for any",
    )
    write_llama_base: Location | None = setting(
        None,
        "Over one text file: cut it as llama.cpp does, and write the reference's logits for its "
        "--kl-divergence-base",
        metavar="FILE",
    )
    candidate_dtype: Dtype | None = setting(
        None, "Type of the candidates' weights (default: the reference's)"
    )
    backend: Literal["auto", "transformers", "llama.cpp", "vllm"] = setting(
        "auto",
        "What runs candidates; auto is llama.cpp itself for .gguf files where heretic-kl[gguf] is "
        "installed, but for a reference with other candidates; vllm (heretic-kl[vllm]) runs all "
        "but .gguf files",
    )
    gguf_cache_type: CacheType = setting(
        "f16", "As what llama.cpp stores keys and values of candidates"
    )
    reference_cache_type: CacheType = setting(
        "f16", "The same of a reference that runs in llama.cpp"
    )
    key_variable: Text | None = setting(
        None, "Environment variable that holds the key of candidates' servers", metavar="NAME"
    )
    top_logprobs: Whole = setting(
        20, "Likeliest tokens that a server is asked for, which give a lower bound; 0: all", ge=0
    )
    response_prefix: str = setting("", "Start of every response")
    batch_size: Whole = setting(16, "Most sequences at once; halved where memory runs out", ge=1)

    @property
    def name(self) -> str:
        """The reference as the user named it."""
        assert self.reference is not None
        return self.reference

    @property
    def stored(self) -> bool:
        """Whether the reference is a file that --save-reference wrote."""
        path = expanded(self.name)
        return path.suffix.lower() == STORED_SUFFIX and not path.is_dir()

    @property
    def base_logits(self) -> bool:
        """Whether the reference is llama.cpp's file of base logits."""
        try:
            with expanded(self.name).open("rb") as file:
                return file.read(8) == b"_logits_"
        except OSError:
            return False

    @property
    def served(self) -> tuple[str, ...]:
        """The candidates behind a server."""
        return tuple(n for n in self.candidate if n.startswith(("http://", "https://")))

    @property
    def over_text(self) -> bool:
        """Whether text is measured in place of responses."""
        return bool(self.text) or self.base_logits

    @property
    def refusal_dataset(self) -> DatasetSpec | None:
        """The prompts of --refusal-prompts: of the built-in ones those to train with."""
        source = self.refusal_prompts
        if source is None:
            return None
        return DatasetSpec(source, "train" if source.startswith("builtin:") else None)

    @property
    def dataset(self) -> DatasetSpec:
        """Where the prompts come from: by default the built-in harmless test prompts."""
        return spec_of(BUILTIN_SPECS["harmless", "test"], vars(self.prompts), "test")


def read_score_settings(words: Sequence[str]) -> ScoreSettings:
    """Read the command line after `score`.

    Raises:
        ConfigError: a flag is wrong, missing, or without effect; one line each.
    """
    settings = _with_chain(read_settings(ScoreSettings, words))
    if settings.reference is None:
        raise ConfigError(
            "no reference given: name the original with --reference (a hub id, a folder, a .gguf "
            "file, or what --save-reference wrote)"
        )
    if not settings.candidate:
        raise ConfigError("no candidate given: name what is measured against it with --candidate")
    set_by_flags = given_flags(ScoreSettings, words)
    _check_files(settings)
    ggufs = [name for name in settings.candidate if name.lower().endswith(".gguf")]
    if not ggufs:
        _refuse(set_by_flags, ("gguf_cache_type",), "without a .gguf candidate")
        if settings.backend == "llama.cpp":
            _refuse(set_by_flags, ("backend",), "without a .gguf candidate")
    if settings.backend == "transformers":
        cache_types = ("gguf_cache_type", "reference_cache_type")
        _refuse(set_by_flags, cache_types, "with --backend transformers")
    if not settings.reference.lower().endswith(".gguf"):
        _refuse(set_by_flags, ("reference_cache_type",), "without a .gguf reference")
    _check_served(settings, set_by_flags)
    if "store" in set_by_flags and "save_reference" not in set_by_flags:
        raise ConfigError("--store has no effect without --save-reference: pass both, or neither")
    if settings.refusal_prompts is not None and settings.divergence != "forward_kl":
        raise ConfigError("--refusal-prompts splits forward_kl alone: leave out --divergence")
    if settings.stored or settings.base_logits:
        _refuse_with_a_stored_reference(settings, set_by_flags)
    if settings.text:
        _check_text(settings, set_by_flags)
    else:
        _refuse(set_by_flags, (*USED_OVER_TEXT, "write_llama_base"), "without --text FILE")
    return settings


def _check_files(settings: ScoreSettings) -> None:
    """Refuse files of a kind that is not written."""
    for name, kinds in (
        ("ranking", (".csv", ".md")),
        ("plot", (".png", ".svg")),
        ("hub_metadata", (".md", ".yaml", ".json")),
    ):
        path: Path | None = getattr(settings, name)
        if path is not None and path.suffix.lower() not in kinds:
            flag, allowed = name.replace("_", "-"), f"{', '.join(kinds[:-1])} or {kinds[-1]}"
            raise ConfigError(f"--{flag} {path}: must end in {allowed}")
    kind = None if settings.hub_metadata is None else settings.hub_metadata.suffix.lower()
    if kind == ".yaml" and hub_dataset(settings) is None:
        raise ConfigError(
            "--hub-metadata FILE.yaml names a dataset of the hub: pass one as --prompts, name with "
            "--hub-dataset the one that has this text or these prompts, or write FILE.md"
        )
    if settings.hub_dataset is not None:
        if kind not in (".yaml", ".md"):
            raise ConfigError("--hub-dataset has no effect without --hub-metadata FILE.yaml or .md")
        if settings.hub_dataset.count("/") != 1:
            raise ConfigError(f"--hub-dataset {settings.hub_dataset}: must be OWNER/NAME")
    if settings.lm_eval is not None:
        if kind != ".json":
            raise ConfigError("--lm-eval has no effect without --hub-metadata FILE.json")
        if len(settings.candidate) > 1:
            raise ConfigError("--lm-eval holds results of one model: pass one --candidate")


def hub_dataset(settings: ScoreSettings) -> str | None:
    """The hub's id of what is measured on; None: it is not from there."""
    if settings.hub_dataset is not None:
        return settings.hub_dataset
    source = settings.dataset.source
    if settings.over_text or settings.stored or source.startswith("builtin:"):
        return None
    local = source.startswith((".", "/", "~")) or Path(source).exists()
    return source if source.count("/") == 1 and not local and not Path(source).suffix else None


def _with_chain(settings: ScoreSettings) -> ScoreSettings:
    """The settings with a chain's first model as the reference, the others as candidates."""
    if not settings.chain:
        return settings
    if settings.reference is not None or settings.candidate:
        raise ConfigError("--chain names all models: leave out --reference and --candidate")
    if len(settings.chain) < 3:
        raise ConfigError(
            "--chain takes at least three models; of two, use --reference, --candidate"
        )
    first, *others = settings.chain
    changed = settings.model_copy(update={"reference": first, "candidate": tuple(others)})
    if changed.stored or changed.base_logits:
        raise ConfigError(f"--chain begins with a model, not with a stored reference ({first})")
    return changed


def _check_served(settings: ScoreSettings, set_by_flags: Set[str]) -> None:
    if not settings.served:
        _refuse(set_by_flags, ("key_variable", "top_logprobs"), "without a candidate URL#MODEL")
        return
    if settings.chain or settings.base_logits:
        raise ConfigError(
            "a candidate behind a server is measured from a model or a stored reference: leave out "
            + ("--chain" if settings.chain else "the file of base logits")
        )
    if not settings.top_logprobs:
        return
    why = "for the likeliest tokens alone: have the server tell all, --top-logprobs 0"
    if settings.candidate[1:]:
        raise ConfigError(f"a lower bound is compared with nothing; pass one --candidate {why}")
    _refuse(set_by_flags, WHOLE_ALONE, why)


def _check_text(settings: ScoreSettings, set_by_flags: Set[str]) -> None:
    _refuse(set_by_flags, UNUSED_OVER_TEXT, "with --text: leave out one of the two")
    if settings.write_llama_base is not None:
        _refuse(set_by_flags, ("stride",), "with --write-llama-base, which scores half of a window")
        _refuse(set_by_flags, ("save_reference",), "with --write-llama-base, a file of its own")
        if len(settings.text) > 1:
            raise ConfigError("--write-llama-base takes one file after --text, as llama.cpp does")
    elif settings.stride >= settings.context:
        raise ConfigError(
            f"--stride {settings.stride} must be less than --context {settings.context}: what is "
            "scored needs text before it"
        )


def _refuse_with_a_stored_reference(settings: ScoreSettings, set_by_flags: Set[str]) -> None:
    why = (
        f"on a stored reference ({settings.reference}): leave it out, or measure from the model "
        "itself"
    )
    if "dtype" in set_by_flags:
        why += "; candidates have --candidate-dtype"
    _refuse(set_by_flags, FIXED_BY_A_STORED_REFERENCE, why)
    _refuse({"text"} if settings.text and not settings.stored else (), ("text",), why)


def _refuse(set_by_flags: Collection[str], names: Sequence[str], why: str) -> None:
    """Reject the first of the flags that were passed and change nothing."""
    for name in names:
        if name in set_by_flags:
            flag = "--no-noise-floor" if name == "noise_floor" else f"--{name}"
            raise ConfigError(f"{flag.replace('_', '-')} has no effect {why}")
