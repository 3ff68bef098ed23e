"""`heretic-kl evaluate`: every scorer on edits that exist already, whoever made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator
from pydantic_core import to_json
from pydantic_settings import NoDecode

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.output import STDOUT, check_json_file, check_new_files, observing, writes_json
from heretic_kl.config import Settings, moved, read_settings
from heretic_kl.config.tables import Location, Text, array, json_file, setting
from heretic_kl.errors import ConfigError
from heretic_kl.files import redacted

if TYPE_CHECKING:
    from pathlib import Path

    from heretic_kl.run.evaluate import Evaluation
    from heretic_kl.ui.event_lines import ConsoleObserver
    from heretic_kl.ui.json_lines import JsonLinesObserver


UNUSED = ("trials", "minutes", "refine", "pick", "save", "save_as", "study_dir")


class EvaluateSettings(Settings):
    """The settings of a run on the original, the candidates, and where the result goes."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Models": ("candidate",),
        "Output": ("use", "html", "harmful_responses", "json_file"),
        **moved(Settings.headings, "Without effect here", UNUSED),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Models", "Output", "Basics")

    candidate: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(array)] = setting(
        (),
        "Edited models (of the hub also ID@REVISION); later ones are compared with the first too",
        metavar="MODEL ...",
    )
    use: Literal["validation", "test"] = setting("test", "Which prompts")
    html: Location | None = setting(
        None, "Write a page: scores, charts, responses side by side, settings", metavar="FILE"
    )
    harmful_responses: bool = setting(
        False, "Show responses to harmful prompts in the page, not only whether they are refused"
    )
    json_file: Location | None = json_file()


OURS = frozenset({"candidate", "use", "html", "harmful_responses", "json_file"})
"""Settings that no run has."""


def run(words: Sequence[str]) -> int:
    """Evaluate as the command line says; return the exit code.

    Raises:
        HereticKLError: a wrong flag, model, scorer or target; one line each.
    """
    settings = read_settings(EvaluateSettings, words)
    if settings.model is None:
        raise ConfigError("no original given: name it with --model")
    if not settings.candidate:
        raise ConfigError("no edit given: name what is measured with --candidate")
    if settings.harmful_responses and settings.html is None:
        raise ConfigError("--harmful-responses has no effect without --html FILE")
    _check_targets(settings)
    plain = Settings(**settings.model_dump(exclude=set(OURS)))
    responses = "all" if settings.harmful_responses else settings.keep_responses
    responses = "none" if settings.html is None else responses
    plain = plain.model_copy(update={"save": None, "pick": None, "keep_responses": responses})

    from heretic_kl.model import ModelSource, check_to_measure
    from heretic_kl.run.evaluate import evaluate
    from heretic_kl.run.setup.load import model_source
    from heretic_kl.run.teller import Teller

    settle_process(plain)
    original = model_source(plain)
    for source in map(ModelSource.named, settings.candidate):
        base = original if plain.base is None else ModelSource.named(plain.base)
        check_to_measure(source, base=base, trust_remote_code=plain.trust_remote_code)
    with observing(quiet=settings.quiet) as observer:
        evaluation = evaluate(plain, settings.candidate, settings.use, Teller(observer))
        show("evaluate", evaluation, settings, observer, where=f"on the {settings.use} prompts")
        if settings.html is not None:
            _write_page(settings.html, evaluation, settings)
    return 0


def _check_targets(settings: EvaluateSettings) -> None:
    """Refuse files that could not be written, before a model is loaded.

    Raises:
        ConfigError: which, and why.
        ExportError: charts cannot be drawn.
    """
    check_json_file(settings.json_file)
    if settings.html is None:
        return
    json_file = None if settings.json_file == STDOUT else settings.json_file
    check_new_files(
        (str(settings.model), *settings.candidate),
        (("--json", json_file), ("--html", settings.html)),
    )
    from heretic_kl.report import check_drawing

    check_drawing()


def _write_page(target: Path, evaluation: Evaluation, settings: EvaluateSettings) -> None:
    """Write the page, its names fit to be shown to others.

    Raises:
        ExportError: the file cannot be written.
    """
    from heretic_kl.export import portable
    from heretic_kl.export.folder import write_text
    from heretic_kl.report import EvaluationReport, distinct, render

    names = distinct([portable(candidate.name) for candidate in evaluation.candidates])
    pairs = zip(evaluation.candidates, names, strict=True)
    report = EvaluationReport(
        original=evaluation.facts["model"],
        use=evaluation.use,
        prompts=evaluation.prompt_texts,
        roles=evaluation.roles,
        scores=evaluation.scores,
        candidates=[replace(candidate, name=name) for candidate, name in pairs],
        responses=evaluation.responses,
        facts=evaluation.facts,
        settings=portable(settings.model_dump(mode="json")),
        command=evaluation.command,
        harmful=settings.harmful_responses,
    )
    write_text(target, redacted(render(report.page())))


class ShownSettings(Protocol):
    """Settings that say where an evaluation goes."""

    @property
    def json_file(self) -> Path | None:
        """A file, or `-`."""
        ...

    def model_dump(self, *, mode: str, exclude: set[str]) -> dict[str, Any]:
        """All of them."""
        ...


def show(
    command: str,
    evaluation: Evaluation,
    settings: ShownSettings,
    observer: ConsoleObserver | JsonLinesObserver,
    *,
    where: str,
) -> None:
    """Tell the observer, write the file, print the tables; `where` says what was measured on."""
    from heretic_kl.events import Result
    from heretic_kl.export.folder import write_text
    from heretic_kl.report import evaluation_footnotes, evaluation_sections
    from heretic_kl.ui.print_tables import print_raw, print_sections
    from heretic_kl.ui.terminal import make_console, say

    document = _document(settings, evaluation)
    text = to_json(document, indent=2, inf_nan_mode="null").decode() + "\n"
    observer.settle()
    observer(Result(command, document))
    if settings.json_file is not None and settings.json_file != STDOUT:
        write_text(settings.json_file, redacted(text))
    if writes_json():
        return
    console = make_console()
    if settings.json_file == STDOUT:
        print_raw(console, text)
        return
    candidates = evaluation.candidates
    print_sections(console, evaluation_sections(evaluation.scores, candidates, where))
    console.print()
    for note in evaluation_footnotes(evaluation.scores, candidates):
        say(console, note, "dim")


def _document(settings: ShownSettings, evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the tables show, and what it was measured with."""
    from heretic_kl.export import installed_versions, machine

    facts = dict(evaluation.facts)
    return {
        **asdict(replace(evaluation, facts={})),
        "facts": {name: facts[name] for name in ("calibration", "prompts") if name in facts},
        "settings": settings.model_dump(mode="json", exclude={"candidate", "json_file", "html"}),
        "versions": installed_versions(),
        "machine": machine(),
    }


COMMAND = Command(
    "evaluate --model ORIGINAL --candidate MODEL ... [--SETTING VALUE ...]",
    f"{SUMMARIES['evaluate']}: refusals, teacher-forced KL and whatever the settings name, on the "
    "original and on each candidate, with differences paired by prompt. Candidates are hub ids, "
    "folders (safetensors), .gguf files and folders with a PEFT adapter. --html writes a page.",
    run,
    EvaluateSettings,
)
