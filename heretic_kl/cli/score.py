"""`heretic-kl score`: any models against one reference, from arguments to tables, JSON and files.

Everything that can be found wrong in seconds is found before the first model is loaded.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic_kl.cli.score_arguments import STDOUT, ScoreArguments, parse_score_arguments
from heretic_kl.errors import ConfigError, ExportError, HereticKLError, MeasurementError
from heretic_kl.prompts import Prompt, fingerprint, load_prompts

if TYPE_CHECKING:
    from heretic_kl.events import Observer
    from heretic_kl.report import MeasurementReport
    from heretic_kl.score import Measurement, TeacherForcedKL


@dataclass(frozen=True)
class _Outcome:
    """What was measured, in the order of the candidates."""

    kl: TeacherForcedKL
    measurements: Sequence[Measurement]
    failure: HereticKLError | None
    """Why a later candidate, and those after it, are not among them."""


def run_score(words: Sequence[str]) -> int:
    """Measure as the command line says; return the exit code.

    Raises:
        HereticKLError: a wrong flag, model, source or target; one line each.
    """
    arguments = parse_score_arguments(words)
    _check_targets(arguments)
    prompts = None if arguments.stored else load_prompts(arguments.prompts)

    from heretic_kl.ui.console import make_observer
    from heretic_kl.ui.measurement import print_measurement, print_raw
    from heretic_kl.ui.terminal import make_console

    results = make_console()
    with make_observer(quiet=arguments.quiet, results=results) as observer:
        outcome = _measure(arguments, prompts, observer)
        observer.settle()
        try:
            if arguments.json == STDOUT:
                print_raw(results, _json_text(arguments, prompts, outcome))
            else:
                print_measurement(results, _report(arguments, prompts, outcome))
        finally:  # a reader of stdout that goes away costs no file
            _write(arguments, prompts, outcome)
    if outcome.failure is not None:
        raise outcome.failure
    return 0


# --- before anything runs -------------------------------------------------------------------


def _check_targets(arguments: ScoreArguments) -> None:
    """Refuse targets that could not be written, or that would replace what is read or written.

    Raises:
        ConfigError: which, and why.
    """
    taken: dict[Path, str] = {}
    for name in (arguments.reference, *arguments.candidates, arguments.prompts.source):
        if Path(name).expanduser().is_file():
            taken[Path(name).expanduser().resolve()] = "is read"
    targets = [("--table", path) for path in _table_paths(arguments)]
    if arguments.json is not None and arguments.json != STDOUT:
        targets.append(("--json", arguments.json))
    if arguments.save_reference is not None:
        targets.append(("--save-reference", arguments.save_reference))
    for flag, path in targets:
        if path.resolve() in taken:
            raise ConfigError(f"{flag} {path}: that file {taken[path.resolve()]} already")
        taken[path.resolve()] = f"is where {flag} goes"
        if path.is_dir():
            raise ConfigError(f"{flag} {path}: a folder of that name exists; name a file")
        _require_writable(flag, path)


def _require_writable(flag: str, path: Path) -> None:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def _table_paths(arguments: ScoreArguments) -> list[Path]:
    """One path a candidate, numbered where there are several."""
    path, count = arguments.table, len(arguments.candidates)
    if path is None:
        return []
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, count + 1)]


def _check_models(arguments: ScoreArguments) -> None:
    from heretic_kl.kl import Reference
    from heretic_kl.model import ModelSource
    from heretic_kl.model.loading.chat import chat_template
    from heretic_kl.score import check_models

    if arguments.base is not None:
        names = (*arguments.candidates, *(() if arguments.stored else (arguments.reference,)))
        if not any(ModelSource(name).adapter for name in names):
            raise ConfigError("--base has no effect: none of the models is an adapter's folder")
    if arguments.chat_template != "model":
        chat_template(None, arguments.chat_template)
    check_models(
        Reference.load(_expanded(arguments.reference)) if arguments.stored else arguments.reference,
        arguments.candidates,
        base=arguments.base,
        trust_remote_code=arguments.trust_remote_code,
    )


# --- measuring ------------------------------------------------------------------------------


def _measure(
    arguments: ScoreArguments, prompts: Sequence[Prompt] | None, observer: Observer
) -> _Outcome:
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with _stage(observer, "Checking the models"):
        _check_models(arguments)
    name = arguments.reference
    with _stage(observer, f"Measuring the reference {name}"), _within_memory(name):
        kl = _reference(arguments, prompts, observer)
    if arguments.save_reference is not None:
        # At once: a candidate that fails later must not cost what was computed here.
        with _writing("--save-reference", arguments.save_reference):
            kl.save(arguments.save_reference, store=arguments.store)
    measurements: list[Measurement] = []
    failure: HereticKLError | None = None
    for name in arguments.candidates:
        try:
            with _stage(observer, f"Measuring {name}"), _within_memory(name):
                measurements.append(kl.score(name, dtype=arguments.candidate_dtype))
        except HereticKLError as error:
            if not measurements:
                raise
            failure = error
            break
    return _Outcome(kl, measurements, failure)


def _reference(
    arguments: ScoreArguments, prompts: Sequence[Prompt] | None, observer: Observer
) -> TeacherForcedKL:
    from heretic_kl.events import Notice
    from heretic_kl.score import TeacherForcedKL

    loading: dict[str, Any] = {
        "base": arguments.base,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "device_map": arguments.device_map,
        "trust_remote_code": arguments.trust_remote_code,
        "notify": lambda message: observer(Notice(message)),
    }
    if prompts is None:
        return TeacherForcedKL.load(_expanded(arguments.reference), **loading)
    return TeacherForcedKL(
        arguments.reference,
        prompts=prompts,
        kl_tokens=arguments.kl_tokens,
        direction=arguments.direction,
        temperature=arguments.temperature,
        position_decay=arguments.position_decay,
        sampling_seed=arguments.responses,
        batch_size=arguments.batch_size,
        template=arguments.chat_template,
        response_prefix=arguments.response_prefix,
        noise_floor=arguments.noise_floor,
        **loading,
    )


@contextmanager
def _stage(observer: Observer, title: str) -> Iterator[None]:
    from heretic_kl.events import StageFinished, StageStarted

    started = time.monotonic()
    observer(StageStarted("measure", title))
    yield
    observer(StageFinished("measure", time.monotonic() - started))


@contextmanager
def _within_memory(name: str) -> Iterator[None]:
    """Memory that runs out where no smaller batch would help is an error of one line."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MeasurementError(
            f"out of memory while {name!r} was measured: try a smaller --dtype, a smaller "
            "--batch-size or --device cpu"
        ) from error


# --- what comes out -------------------------------------------------------------------------


def _report(
    arguments: ScoreArguments, prompts: Sequence[Prompt] | None, outcome: _Outcome
) -> MeasurementReport:
    from heretic_kl.report import MeasuredCandidate, MeasurementReport

    first, *_ = outcome.measurements
    floor = first.noise_floor
    count = f"{outcome.kl.prompts} prompt{'s' if outcome.kl.prompts > 1 else ''}"
    of = "the stored reference"
    if prompts is not None:
        of = replace(arguments.prompts, limit=None).describe()
    name = arguments.reference
    if arguments.stored and (stored := _settings(outcome).get("model")) is not None:
        name = f"{name}, stored from {stored}"
    return MeasurementReport(
        reference=name,
        reference_dtype=first.reference_dtype,
        responses=str(_settings(outcome)["responses"]),
        prompts=f"{count} of {of}",
        positions=outcome.kl.kl_tokens,
        rounding_floor=None if floor is None else floor.rounding,
        position_decay=first.position_decay,
        candidates=tuple(
            MeasuredCandidate(
                name,
                found.candidate_dtype,
                found.summary,
                None if found is first else found.compare(first),
            )
            for name, found in zip(arguments.candidates, outcome.measurements, strict=False)
        ),
    )


def _json_text(
    arguments: ScoreArguments, prompts: Sequence[Prompt] | None, outcome: _Outcome
) -> str:
    """Everything the tables show and what is needed to measure it again."""
    from heretic_kl.export import installed_versions, machine
    from heretic_kl.kl import METRIC_VERSION

    first, *_ = outcome.measurements
    settings = _settings(outcome)
    stored = prompts is None
    candidates = []
    for name, found in zip(arguments.candidates, outcome.measurements, strict=False):
        paired = None if found is first else _plain_pair(found.compare(first))
        candidates.append({"name": name, **found.to_dict(), "against_first": paired})
    document = {
        "command": "heretic-kl score",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "metric_version": METRIC_VERSION,
        "versions": installed_versions(),
        "machine": machine(),
        "reference": {
            "name": arguments.reference,
            "stored": stored,
            "model": settings.get("model"),
            "dtype": first.reference_dtype,
            "tokenizer_hash": outcome.kl.reference.identity.tokenizer_hash,
        },
        "prompts": {
            "source": None if stored else arguments.prompts.describe(),
            "count": outcome.kl.prompts,
            "sha256": settings["prompts"] if prompts is None else fingerprint(prompts),
        },
        "kl_tokens": outcome.kl.kl_tokens,
        "responses": settings["responses"],
        "direction": outcome.kl.direction,
        "temperature": outcome.kl.temperature,
        "position_decay": outcome.kl.position_decay,
        "settings": _plain_settings(arguments),
        "candidates": candidates,
        "failure": None if outcome.failure is None else str(outcome.failure),
    }
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _plain_pair(pair: Any) -> dict[str, Any]:
    interval = None if pair.interval is None else pair.interval._asdict()
    return {**pair._asdict(), "interval": interval}


def _plain_settings(arguments: ScoreArguments) -> dict[str, Any]:
    """The flags in force; of a stored reference only those that still had a say."""
    from heretic_kl.cli.score_arguments import FIXED_BY_A_STORED_REFERENCE

    left_out = {"reference", "candidates", "prompts", "responses", "quiet"}
    if arguments.stored:
        left_out |= set(FIXED_BY_A_STORED_REFERENCE)
    plain: dict[str, Any] = {}
    for field in fields(arguments):
        if field.name not in left_out:
            value = getattr(arguments, field.name)
            plain[field.name] = str(value) if isinstance(value, Path) else value
    if not arguments.stored:
        plain["prompts"] = asdict(arguments.prompts)
    return plain


def _settings(outcome: _Outcome) -> Mapping[str, Any]:
    """What the reference remembers of how it was made."""
    return outcome.kl.reference.identity.settings


def _finite(value: Any) -> Any:
    """The same without infinities and NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(arguments: ScoreArguments, prompts: Sequence[Prompt] | None, outcome: _Outcome) -> None:
    from heretic_kl.export.folder import write_text

    for path, found in zip(_table_paths(arguments), outcome.measurements, strict=False):
        with _writing("--table", path):
            found.table.save(path)
    if arguments.json is not None and arguments.json != STDOUT:
        with _writing("--json", arguments.json):
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.json, _json_text(arguments, prompts, outcome))


@contextmanager
def _writing(flag: str, path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"{flag} {path}: cannot be written: {reason}") from error


def _expanded(name: str) -> str:
    return os.path.expanduser(name)
