"""The files that `heretic-kl score` writes: checked before anything runs, written at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heretic_kl.cli.output import STDOUT, check_new_files
from heretic_kl.cli.score.output import Outcome, json_text, measured_on, report
from heretic_kl.cli.score.settings import ScoreSettings
from heretic_kl.errors import ConfigError, ExportError
from heretic_kl.prompts import Prompt

if TYPE_CHECKING:
    from heretic_kl.score import MeasuredOn, Measurement


def check_targets(settings: ScoreSettings) -> None:
    """Refuse targets that could not be written, or that would replace what is read or written.

    Raises:
        ConfigError: which, and why.
        ExportError: pictures cannot be drawn.
    """
    read = (settings.name, *settings.candidate, settings.dataset.source, *map(str, settings.text))
    lm_eval = [] if settings.lm_eval is None else [str(settings.lm_eval)]
    check_new_files((*read, *lm_eval), _targets(settings))
    if settings.lm_eval is not None:
        _harness_results(settings)
    if settings.plot is not None or settings.html is not None:
        from heretic_kl.report import check_drawing

        check_drawing()


def write_files(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome
) -> None:
    """Write everything that was asked for.

    Raises:
        ExportError: a file cannot be written.
    """
    for path, measurement in zip(
        _numbered(settings, settings.table), outcome.measurements, strict=False
    ):
        with writing("--table", path):
            measurement.table.save(path)
    texts = list(_texts(settings, prompts, outcome))
    for flag, path, text in texts:
        with writing(flag, path):
            _write(path, text)
    if settings.plot is not None:
        with writing("--plot", settings.plot):
            settings.plot.parent.mkdir(parents=True, exist_ok=True)
            outcome.comparison(settings).plot(settings.plot)


def _texts(
    settings: ScoreSettings, prompts: Sequence[Prompt] | None, outcome: Outcome
) -> Iterator[tuple[str, Path, str]]:
    """Flag, path and content of every file of text."""
    if settings.json_file is not None and settings.json_file != STDOUT:
        yield "--json", settings.json_file, json_text(settings, prompts, outcome)
    if settings.ranking is not None:
        comparison = outcome.comparison(settings)
        markdown = settings.ranking.suffix.lower() == ".md"
        text = comparison.to_markdown() if markdown else comparison.to_csv()
        yield "--ranking", settings.ranking, text
    if settings.html is not None:
        from heretic_kl.report import measurement_page, render

        comparison = outcome.comparison(settings)
        shown = report(settings, prompts, outcome)
        page = measurement_page(shown, comparison.points(), comparison.levels())
        yield "--html", settings.html, render(page)
    if settings.hub_metadata is not None:
        paths = _numbered(settings, settings.hub_metadata)
        on = measured_on(settings, prompts, outcome)
        named = zip(settings.candidate, outcome.measurements, strict=False)
        for path, (name, measurement) in zip(paths, named, strict=False):
            yield "--hub-metadata", path, _hub_text(settings, path, name, measurement, on)


def _hub_text(
    settings: ScoreSettings, path: Path, name: str, measurement: Measurement, on: MeasuredOn
) -> str:
    from heretic_kl.model import ModelSource
    from heretic_kl.score import card_metadata, evaluation_results, merged_with_lm_eval

    kind = path.suffix.lower()
    if kind == ".md":
        return card_metadata(ModelSource(name).short_name, measurement, on)
    if kind == ".yaml":
        return evaluation_results(measurement, on)
    merged = merged_with_lm_eval(_harness_results(settings), measurement, on)
    return json.dumps(merged, indent=2) + "\n"


def _harness_results(settings: ScoreSettings) -> Mapping[str, Any]:
    """The results file of lm-evaluation-harness; {} without one.

    Raises:
        ConfigError: it is none.
    """
    if settings.lm_eval is None:
        return {}
    try:
        results = json.loads(settings.lm_eval.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"--lm-eval {settings.lm_eval}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"--lm-eval {settings.lm_eval}: not JSON: {error}") from error
    if not isinstance(results, dict) or not isinstance(results.get("results"), dict):
        raise ConfigError(
            f'--lm-eval {settings.lm_eval}: no results of lm-evaluation-harness (no "results")'
        )
    return results


def _targets(settings: ScoreSettings) -> Iterator[tuple[str, Path | None]]:
    yield from (("--table", path) for path in _numbered(settings, settings.table))
    yield from (("--hub-metadata", p) for p in _numbered(settings, settings.hub_metadata))
    yield "--json", None if settings.json_file == STDOUT else settings.json_file
    yield "--save-reference", settings.save_reference
    yield "--ranking", settings.ranking
    yield "--plot", settings.plot
    yield "--html", settings.html
    yield "--write-llama-base", settings.write_llama_base


def _numbered(settings: ScoreSettings, path: Path | None) -> list[Path]:
    """One path a candidate, numbered where there are several."""
    count = len(settings.candidate)
    if path is None:
        return []
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{n}{path.suffix}") for n in range(1, count + 1)]


def _write(path: Path, text: str) -> None:
    from heretic_kl.files import new_file, redacted

    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        partial.write_bytes(redacted(text).encode("utf-8", "backslashreplace"))


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Say in one line that a file cannot be written.

    Raises:
        ExportError: so.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ExportError(f"{flag} {path}: cannot be written: {reason}") from error
