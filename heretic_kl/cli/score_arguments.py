"""The flags of `heretic-kl score` as checked values. Imports no torch, touches no file."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

from heretic_kl.errors import ConfigError
from heretic_kl.prompts import BUILTIN_SPECS, DatasetSpec

PROGRAM: Final = "heretic-kl score"
DIRECTIONS: Final = ("forward", "reverse", "jensen_shannon")
DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
STORED_SUFFIX: Final = ".safetensors"
STDOUT: Final = Path("-")

DEFAULTS: Final[dict[str, Any]] = {
    "kl_tokens": 8,
    "direction": "forward",
    "temperature": 1.0,
    "position_decay": 1.0,
    "responses": None,
    "batch_size": 16,
    "chat_template": "model",
    "response_prefix": "",
    "noise_floor": True,
    "dtype": "auto",
    "candidate_dtype": None,
    "device": "auto",
    "device_map": None,
    "base": None,
    "trust_remote_code": False,
    "json": None,
    "table": None,
    "save_reference": None,
    "store": "hidden",
    "threads": 0,
    "quiet": False,
}
FIXED_BY_A_STORED_REFERENCE: Final = (
    *("kl_tokens", "prompts", "split", "column", "limit", "system", "direction", "temperature"),
    *("position_decay", "responses", "batch_size", "chat_template", "response_prefix"),
    *("noise_floor", "dtype", "save_reference", "store"),
)


@dataclass(frozen=True)
class ScoreArguments:
    """What is to be measured, how, and where the result goes."""

    reference: str
    candidates: tuple[str, ...]
    prompts: DatasetSpec
    kl_tokens: int
    direction: Literal["forward", "reverse", "jensen_shannon"]
    temperature: float
    position_decay: float
    responses: int | None
    """Seed that the reference's answers are drawn with; None: they are greedy."""
    batch_size: int
    chat_template: str
    response_prefix: str
    noise_floor: bool
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    candidate_dtype: Literal["auto", "float32", "bfloat16", "float16"] | None
    device: str
    device_map: str | None
    base: str | None
    trust_remote_code: bool
    json: Path | None
    table: Path | None
    save_reference: Path | None
    store: Literal["hidden", "logits"]
    threads: int
    quiet: bool

    @property
    def stored(self) -> bool:
        """Whether the reference is a file that --save-reference wrote."""
        return is_stored(self.reference)


def is_stored(reference: str) -> bool:
    """Whether a reference is named that can only be a stored one."""
    path = Path(reference).expanduser()
    return path.suffix.lower() == STORED_SUFFIX and not path.is_dir()


def parse_score_arguments(words: Sequence[str]) -> ScoreArguments:
    """Read the command line after `score`.

    Raises:
        ConfigError: one line; an unknown flag comes with the nearest known one.
    """
    parser = _parser(80)
    found, rest = parser.parse_known_args(list(words))
    if rest:
        raise ConfigError(_unexpected(rest[0], parser))
    given = dict(vars(found))
    reference, candidates = given.pop("reference", ""), tuple(given.pop("candidates", ()))
    if not reference:
        raise ConfigError(
            "no reference given: name the original with --reference (a hub id, a folder, a .gguf "
            "file, or what --save-reference wrote)"
        )
    if not all(candidates) or not candidates:
        raise ConfigError("no candidate given: name what is measured against it with --candidate")
    _require_no_ignored(reference, given)
    given.pop("sequential", None)
    prompts = _prompts(given)
    return ScoreArguments(reference, candidates, prompts, **{**DEFAULTS, **given})


def score_help(width: int) -> str:
    """What `heretic-kl score --help` shows."""
    return _parser(width).format_help().rstrip()


def _require_no_ignored(reference: str, given: dict[str, Any]) -> None:
    """Refuse what would have no effect: the user means something by it."""
    if "store" in given and "save_reference" not in given:
        raise ConfigError("--store says how --save-reference writes; give that too, or neither")
    if is_stored(reference):
        for name in FIXED_BY_A_STORED_REFERENCE:
            if name in given:
                hint = "; candidates have --candidate-dtype" if name == "dtype" else ""
                raise ConfigError(
                    f"{_flag(name)} has no effect on a stored reference ({reference}): leave it "
                    f"out, or measure from the model itself{hint}"
                )


def _prompts(given: dict[str, Any]) -> DatasetSpec:
    """Take the flags about prompts out of `given`."""
    parts = {
        name: given.pop(name) for name in ("split", "column", "limit", "system") if name in given
    }
    source = given.pop("prompts", None)
    default = BUILTIN_SPECS["harmless", "test"]
    if source is None:
        return replace(default, **parts)
    if not source:
        raise ConfigError("--prompts needs a source: a file, a folder, a hub id or builtin:NAME")
    if source.startswith("builtin:"):
        parts.setdefault("split", default.split)
    return DatasetSpec(source, **parts)


# --- the parser -----------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, by raising."""

    def error(self, message: str) -> NoReturn:
        text = re.sub(r"^argument (\S+): ", r"\1 ", message)
        text = re.sub(r"expected (at least )?one argument", "needs a value", text)
        raise ConfigError(re.sub(r"ignored explicit argument .*", "takes no value", text))


def _parser(width: int) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} --reference MODEL --candidate MODEL [--FLAG VALUE ...]",
        description="Measures the teacher-forced KL divergence of candidates from a reference: "
        "any models with one tokenizer, for instance a fine-tune, a quantization, a merge or a "
        "PEFT adapter and what it was made from. The reference answers each prompt, and both "
        "models are fed its answer.",
        epilog="Models are hub ids, folders (safetensors), .gguf files and folders with a PEFT "
        "adapter. [x] is the default.",
        formatter_class=partial(argparse.HelpFormatter, width=width, max_help_position=30),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    _add_models(parser)
    _add_measure(parser)
    _add_running(parser)
    _add_output(parser)
    return parser


def _add_models(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Models").add_argument
    add("--reference", metavar="MODEL", help="the original; or a file that --save-reference wrote")
    add(
        "--candidate",
        dest="candidates",
        metavar="MODEL",
        action="extend",
        nargs="+",
        help="what is measured against it; may be given several times: later ones are also "
        "compared with the first, paired by prompt",
    )
    add("--base", metavar="MODEL", help="what adapters are put on [the model they name]")
    add("--trust-remote-code", action="store_true", help="run code from a model's repository")


def _add_measure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("What is measured").add_argument
    add("--kl-tokens", metavar="N", type=_whole(1), help="positions scored of each answer [8]")
    add(
        "--prompts",
        metavar="SOURCE",
        help="a file (.txt, .jsonl, .csv, .parquet), a folder, a hub dataset or builtin:NAME "
        "[builtin:harmless, split test]",
    )
    add("--split", metavar="S", help="part of the source: train, test[:100]")
    add("--column", metavar="C", help="column that holds the prompts")
    add("--limit", metavar="N", type=_whole(1), help="at most so many prompts")
    add("--system", metavar="TEXT", help="system prompt")
    add("--direction", metavar="NAME", type=_one_of(DIRECTIONS), help=_listed(DIRECTIONS))
    add("--temperature", metavar="T", type=_number(), help="of both distributions [1]")
    add(
        "--position-decay",
        metavar="D",
        type=_number(1.0),
        help="weight of a position relative to the one before, above 0 and at most 1 [1]",
    )
    add(
        "--responses",
        metavar="HOW",
        type=_responses,
        help="the reference's answers: greedy, or 'sampled(SEED)': drawn at temperature 1 [greedy]",
    )
    add(
        "--chat-template",
        metavar="T",
        help="model (plain text if it has none), none, or a Jinja file [model]",
    )
    add("--response-prefix", metavar="TEXT", help="put at the start of every answer")
    add(
        "--no-noise-floor",
        dest="noise_floor",
        action="store_false",
        help="do not measure what an unchanged model shows",
    )


def _add_running(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("How it runs").add_argument
    add(
        "--batch-size",
        metavar="N",
        type=_whole(1),
        help="most sequences at once; halved where memory runs out [16]",
    )
    add("--dtype", metavar="NAME", type=_one_of(DTYPES), help=_listed(DTYPES))
    add(
        "--candidate-dtype",
        metavar="NAME",
        type=_one_of(DTYPES),
        help="the same for candidates [the reference's]",
    )
    add("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps [auto]")
    add("--device-map", metavar="NAME", help="spread models over devices, for instance auto")
    add(
        "--sequential",
        action="store_true",
        help="never hold two models in memory; it is always so, the flag only says it",
    )
    add("--threads", metavar="N", type=_whole(0), help="CPU threads; 0: torch's default [0]")
    add("--quiet", action="store_true", help="no progress; notices and results stay")
    add("-h", "--help", action="store_true", help="show this")


def _add_output(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Output, beside the tables on stdout").add_argument
    add("--json", metavar="OUT", type=_path, help="everything as JSON; - : on stdout, no tables")
    add(
        "--table",
        metavar="OUT",
        type=_safetensors,
        help="every prompt and position, as .safetensors; several candidates go to "
        "OUT-1.safetensors, OUT-2.safetensors and so on",
    )
    add(
        "--save-reference",
        metavar="OUT",
        type=_safetensors,
        help="keep the reference's side as .safetensors, to measure more candidates later without "
        "its model",
    )
    add(
        "--store",
        metavar="WHAT",
        type=_one_of(("hidden", "logits")),
        help="hidden: small, lossless, for candidates with the reference's own output head; "
        "logits: float16, large, for any [hidden]",
    )


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names)} [{names[0]}]"


def _unexpected(word: str, parser: argparse.ArgumentParser) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}; a model is given as --candidate {word}"
    flag = word.partition("=")[0]
    known = [name for action in parser._actions for name in action.option_strings]
    nearest = difflib.get_close_matches(flag, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"`{PROGRAM} --help` lists all of them"
    return f"unknown flag {flag}; {hint}"


def _flag(name: str) -> str:
    return "--no-noise-floor" if name == "noise_floor" else f"--{name.replace('_', '-')}"


# --- values ---------------------------------------------------------------------------------


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, {least} or more, got {text!r}"
            )
        return int(text)

    return read


def _number(most: float = math.inf) -> Callable[[str], float]:
    """Above 0, finite and at most `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (0.0 < value <= most and math.isfinite(value)):
            bound = "" if math.isinf(most) else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be a number above 0{bound}, got {text!r}")
        return value

    return read


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            nearest = difflib.get_close_matches(text, names, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(names)}, got {text!r}{hint}"
            )
        return text

    return read


def _responses(text: str) -> int | None:
    match = re.fullmatch(r"greedy|sampled\((\d{1,18})\)", text)
    if match is None:
        raise argparse.ArgumentTypeError(
            f"must be greedy or 'sampled(SEED)', for instance 'sampled(0)', got {text!r}"
        )
    return None if match[1] is None else int(match[1])


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("needs a path")
    return STDOUT if text == "-" else Path(text).expanduser()


def _safetensors(text: str) -> Path:
    path = _path(text)
    if path.suffix.lower() != STORED_SUFFIX:
        raise argparse.ArgumentTypeError(f"must end in {STORED_SUFFIX}, got {text!r}")
    return path
