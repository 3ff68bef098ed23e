"""The flags of commands on a study, and the study and the trial that they name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BeforeValidator
from pydantic_settings import NoDecode

from heretic_kl.cli.edits.upload import PUBLIC
from heretic_kl.config import ProgramSettings, Settings, moved, read_settings
from heretic_kl.config.tables import Location, Text, Whole, array, json_file, setting
from heretic_kl.config.tables import words as comma_words
from heretic_kl.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from heretic_kl.search import StoredStudy, TrialRecord

SettingsT = TypeVar("SettingsT", bound=Settings)
STUDY_HELP = "Name or .journal file of the study (default: the newest)"
UNTRUSTED = {"lm_eval": ("tasks",), "judge": ("endpoint", "key_variable")}
"""Settings of scorers that run code or send something away: no study says them."""
TRIAL = "Number of the trial"
PICK = "Rule in place of a number: knee, max-refusals=0.05"
PREVIEW = (
    "Respond to a few validation prompts, original beside trial: harmless shows responses, harmful "
    "who refuses; takes settings of a run too"
)
TEST = "Measure it on the test prompts, if that was not done yet; takes settings of a run too"
COMPARE = "Number of another trial: shows the differences, paired by prompt"


def _kind(value: object) -> object:
    """As the flag was before it named a kind."""
    return {"true": "harmless", "false": None}.get(str(value).lower(), value)


Preview = Annotated[Literal["harmless", "harmful"] | None, BeforeValidator(_kind)]


class StudySettings(ProgramSettings):
    """Which study."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Study": ("study", "study_dir", "storage"),
        "Output": ("quiet", "debug"),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Study", "Output")
    everywhere: ClassVar[frozenset[str]] = frozenset({"study_dir", "storage"})

    study: Text | None = setting(None, STUDY_HELP, metavar="STUDY")
    study_dir: Location = setting(Path("studies"), "Folder of the studies", metavar="FOLDER")
    storage: Text | None = setting(
        None, "Optuna storage URL (default: a journal file in study_dir)", metavar="URL"
    )


class TrialsSettings(StudySettings):
    """Which trials are listed."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Study": ("study", "beside", "pick", "study_dir", "storage"),
        "Output": ("every", "where", "sort", "quiet", "debug"),
    }
    beside: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(comma_words)] = setting(
        (), "More studies: one table of them all, a line each", metavar="STUDY ..."
    )
    pick: Text = setting("knee", "Which trial that table shows of each study", metavar="RULE")
    every: bool = setting(False, "List every trial, not only the front", short="all")
    where: Text | None = setting(
        None, "List finished trials within limits: max-refusals=0.05", metavar="LIMITS"
    )
    sort: Text | None = setting(
        None, "List finished trials by this score, best first", metavar="SCORE"
    )


class ShowSettings(StudySettings):
    """Which trial is shown."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Trial": ("study", "trial", "pick", "compare", "preview", "test", "study_dir", "storage"),
        "Output": ("quiet", "debug"),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Trial", "Output")

    trial: Whole | None = setting(None, TRIAL, ge=0)
    pick: Text | None = setting(None, PICK, metavar="RULE", short="p")
    compare: Whole | None = setting(None, COMPARE, ge=0)
    preview: Preview = setting(None, PREVIEW, metavar="KIND", bare="harmless")
    test: bool = setting(False, TEST)


class TrialOfStudySettings(Settings):
    """Which trial is run again; whatever else is set replaces what the study was made with."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Trial": ("study", "trial"),
        **Settings.headings,
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Trial", "Saving")

    study: Text | None = setting(None, STUDY_HELP, metavar="STUDY")
    trial: Whole | None = setting(None, TRIAL, ge=0)


class PreviewSettings(TrialOfStudySettings):
    """Which trial responds or is measured, where `show` loads the model for that."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Trial": ("study", "trial", "compare", "preview", "test"),
        **Settings.headings,
    }

    compare: Whole | None = setting(None, COMPARE, ge=0)
    preview: Preview = setting(None, PREVIEW, metavar="KIND", bare="harmless")
    test: bool = setting(False, TEST)


class SaveSettings(TrialOfStudySettings):
    """Which trial is saved, and where it is uploaded."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Trial": ("study", "trial"),
        "Upload": ("upload", "public"),
        **moved(Settings.headings, "Saving", ("save", "save_as")),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Trial", "Saving", "Upload")

    upload: Text | None = setting(
        None, "Upload it to this repository of the hub: NAME or USER/NAME", metavar="NAME"
    )
    public: bool = setting(False, PUBLIC)


class BenchSettings(TrialOfStudySettings):
    """Which trial is measured, by which benchmarks."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Trial": ("study", "trial"),
        "Benchmarks": ("task", "metric", "filter", "tasks_folder", "limit", "few_shot", "chat"),
        "Output": ("json_file",),
        **Settings.headings,
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Trial", "Benchmarks", "Output")

    task: Annotated[tuple[Text, ...], NoDecode, BeforeValidator(array)] = setting(
        (), "Tasks, as lm-eval or the folder names them (required)", metavar="TASK ..."
    )
    metric: Text | None = setting(
        None,
        "Metric whose mean over documents is shown (default: acc, the only one, or exact_match)",
    )
    filter: Text | None = setting(
        None,
        "How answers are read from responses (default: the first of the task's filters)",
        metavar="NAME",
    )
    tasks_folder: Location | None = setting(
        None, "Folder of further tasks (YAML); their code is run", metavar="FOLDER"
    )
    limit: Whole = setting(100, "Most documents of a task (0: all)", ge=0)
    few_shot: Whole | None = setting(
        None, "Examples before each document (default: the task's own number)", ge=0
    )
    chat: bool = setting(False, "Put documents into the chat template")
    json_file: Location | None = json_file()


class NamesStudy(Protocol):
    """Settings that say which study."""

    @property
    def study(self) -> str | None:
        """Name or journal file."""
        ...

    @property
    def study_dir(self) -> Path:
        """Folder of journal files."""
        ...

    @property
    def storage(self) -> str | None:
        """A storage URL in place of the folder."""
        ...


def read_named(settings: NamesStudy, test_tokens: int | None = None) -> StoredStudy:
    """The study that settings name; see `read_study` for `test_tokens`.

    Raises:
        StudyError: there is none, or it cannot be read.
    """
    from heretic_kl.search import quiet_optuna, read_study

    quiet_optuna()
    where = settings.study, settings.study_dir, settings.storage
    return read_study(*where, test_tokens=test_tokens)


def settings_of(
    kind: type[TrialOfStudySettings],
    words: Sequence[str],
    named: TrialOfStudySettings,
    study: StoredStudy,
    *,
    measures: bool = True,
) -> Settings:
    """What a study was made with, and what the command line says on top.

    Without `measures` its scorers measure nothing, and send nothing anywhere.
    """
    values = read_beside_study(kind, words, study, measures=measures).model_dump()
    values.update(
        study_name=study.name,
        study_dir=study.folder or named.study_dir,
        storage=named.storage,
        pick=None,
    )
    return Settings(**{name: values[name] for name in Settings.model_fields})


def read_beside_study(
    kind: type[SettingsT], words: Sequence[str], study: StoredStudy, *, measures: bool = True
) -> SettingsT:
    """The settings of a study, and the command line on top of them.

    A study may come from anyone: the code that it names is not run, and nothing is sent where it
    says, unless the command line names it too, and it does not say where something is written.
    Without `measures` no scorer asks a server. What this machine lacks is its own default.

    Raises:
        ConfigError: a setting is wrong, or the study uses code or a server that the command line
            does not name.
    """
    from heretic_kl.run.setup.open_run import NOT_KEPT
    from heretic_kl.scoring import built_in_scorers

    left_out = NOT_KEPT | lacking(study).keys()
    stored = {key: value for key, value in study.settings.items() if key not in left_out}
    scorers: dict[str, Any] = {**stored.get("scorers", {})}
    plug_ins, servers = {}, {}
    for name, table in scorers.items():
        if (use := table.get("use") or name) not in built_in_scorers():
            plug_ins[name] = use
            scorers[name] = {**table, "use": None}
        elif use in UNTRUSTED:
            stated = table.get("settings", {})
            taken = {key: stated[key] for key in stated if key not in UNTRUSTED[use]}
            scorers[name] = {**table, "settings": taken}
            if measures and "endpoint" in stated:
                servers[name] = stated["endpoint"]
    stored |= {"scorers": scorers, "trust_remote_code": False}
    settings = read_settings(kind, words, stored=stored)
    for name, use in plug_ins.items():
        if settings.scorers[name].enabled and settings.scorers[name].use is None:
            raise ConfigError(
                f"study {study.name!r} uses the scorer plug-in {use}: name it yourself if you "
                f"trust it, with --scorers.{name}.use FILE.py:CLASS"
            )
    for name, url in servers.items():
        if settings.scorers[name].enabled and "endpoint" not in settings.scorers[name].settings:
            raise ConfigError(
                f"study {study.name!r} sends responses to {url}: name it yourself if you trust it, "
                f"with --scorers.{name}.settings.endpoint URL, and .key_variable where it needs one"
            )
    return settings


def lacking(study: StoredStudy) -> dict[str, Any]:
    """Device and threads that a study names, as far as this machine does not have them."""
    from heretic_kl.model.loading.devices import resolve_device

    missing: dict[str, Any] = {}
    device, threads = (study.settings.get(name) for name in ("device", "threads"))
    if isinstance(threads, int) and threads > (os.cpu_count() or 1):
        missing["threads"] = threads
    try:
        resolve_device(device if isinstance(device, str) else "auto")
    except ModelError:
        missing["device"] = device
    return missing


def unsaid(settings: Settings) -> list[str]:
    """The flags by which a command on a study names what `read_beside_study` does not take."""
    flags = ["--trust-remote-code"] if settings.trust_remote_code else []
    for name, table in settings.scorers.items():
        if table.use is not None:
            flags.append(f"--scorers.{name}.use={table.use}")
        for key in UNTRUSTED.get(table.use or name, ()):
            if table.settings.get(key) is not None:
                flags.append(f"--scorers.{name}.settings.{key}={table.settings[key]}")
    return flags


def rule_of(trial: int | None, pick: str | None) -> str:
    """The rule that `--trial` and `--pick` stand for.

    Raises:
        ConfigError: neither or both are given.
    """
    if (trial is None) == (pick is None):
        raise ConfigError(
            "say which trial: --trial NUMBER or --pick RULE"
            if trial is None
            else "--trial and --pick both name a trial: leave one out"
        )
    return f"trial={trial}" if pick is None else pick


def picked(study: StoredStudy, rule: str) -> TrialRecord:
    """The trial of a study that a rule names.

    Raises:
        SelectionError: the rule is unknown.
        NoTrialError: no trial meets it.
    """
    from heretic_kl.search import check_rule, pick

    check_rule(rule, list(study.roles))
    return pick(rule, study.front, study.records)
