"""`heretic-kl slurm`: the templates in `slurm/`, filled in. Searches nothing."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

import tomlkit

import heretic_kl
from heretic_kl import files
from heretic_kl.cli.command import PROGRAM, SUMMARIES, Command
from heretic_kl.cli.output import observing
from heretic_kl.cli.study.settings import unsaid
from heretic_kl.config import Settings, load_settings, read_settings
from heretic_kl.config.tables import Location, Text, Whole, setting
from heretic_kl.errors import ConfigError, StudyError

SCRIPT: Final = "study.sbatch"
SCRIPTS: Final = (SCRIPT, "sweep.sbatch", "training-loss.sbatch", "setup-node.sh")
NOT_OF_THE_RUN: Final = {"storage", "study_name", "study_dir", "workers", "quiet"}
"""Settings that the script states itself."""


class SlurmSettings(Settings):
    """What a cluster is asked for, and the settings of the search."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Cluster": ("submit", "folder", "partition", "gpus", "cpus", "hours"),
        **Settings.headings,
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Cluster", "Basics")

    submit: bool = setting(False, "Hand the script to sbatch")
    folder: Location = setting(
        Path("heretic-kl-slurm"), "Folder of the script, on a shared disk", metavar="FOLDER"
    )
    partition: Text | None = setting(None, "Partition (default: the cluster's)", metavar="NAME")
    gpus: Whole = setting(0, "GPUs of each worker", ge=0)
    cpus: Whole = setting(1, "CPUs of each worker", ge=1)
    hours: Whole = setting(24, "Time limit", ge=1)


def run(words: Sequence[str]) -> int:
    """Write the scripts, and submit that of the study where asked to; return the exit code."""
    settings = read_settings(SlurmSettings, words)
    if settings.model is None:
        raise ConfigError("no model given: name one with --model")
    if settings.save is not None and settings.pick is None:
        raise ConfigError("--save on a cluster needs --pick, for instance --pick knee")
    if settings.workers == 0:
        raise ConfigError("--workers 0 counts the GPUs of this machine: say how many jobs")
    from heretic_kl.events import Notice, Result

    script = write(settings)
    answer = submitted(script) if settings.submit else None
    with observing(quiet=settings.quiet) as observer:
        if settings.gpus > 1 and settings.device_map is None:
            observer(
                Notice(
                    f"each job asks for {settings.gpus} GPUs and uses one: spread the model with "
                    "--device-map auto, or leave --gpus at 1 and raise --workers"
                )
            )
        said = answer or f"written: submit it with sbatch {shlex.quote(str(script))}"
        observer(Notice(f"{said}; beside it are {', '.join(SCRIPTS[1:])}"))
        observer(Result("slurm", {"script": str(script), "sbatch": answer}))
    return 0


def write(settings: SlurmSettings) -> Path:
    """Write the settings file and the scripts, for their owner alone; return that of the study.

    Raises:
        StudyError: the folder cannot be written.
    """
    folder = settings.folder
    fields = set(SlurmSettings.model_fields) - set(Settings.model_fields)
    values = settings.model_dump(
        mode="json", exclude_defaults=True, exclude_none=True, exclude=NOT_OF_THE_RUN | fields
    )
    try:
        files.write_text(folder / "settings.toml", tomlkit.dumps(values))
        for name in SCRIPTS:
            files.write_text(folder / name, filled(name, settings))
        for name in ("settings.toml", *SCRIPTS):
            (folder / name).chmod(0o700 if name.endswith(".sh") else 0o600)
    except OSError as error:
        raise StudyError(f"cannot write {str(folder)!r}: {error.strerror}") from error
    load_settings(["--config", str(folder / "settings.toml")])  # what was written is read alike
    return folder / SCRIPT


def filled(script: str, settings: SlurmSettings) -> str:
    """A script with the settings' values in its head."""
    text = (script_folder() / script).read_text(encoding="utf-8")
    for name, value in _variables(script, settings).items():
        stated = shlex.quote(value) if isinstance(value, str) else f"({shlex.join(value)})"
        text = _replaced(text, rf"({name}=).*", stated)
    if script.endswith(".sh"):
        return text
    log = "%a.log" if script == SCRIPT else f"{Path(script).stem}-%a.log"
    requests = {
        "cpus-per-task": str(settings.cpus),
        "time": f"{settings.hours}:00:00",
        "output": str(settings.folder / log),
    }
    if script == SCRIPT:
        requests["array"] = f"0-{settings.workers - 1}"
    for name, value in requests.items():
        text = _replaced(text, rf"(#SBATCH --{name}=).*", value)
    more = [f"#SBATCH --partition={settings.partition}"] if settings.partition else []
    more += [f"#SBATCH --gpus-per-task={settings.gpus}"] if settings.gpus else []
    head, line, rest = text.partition("#SBATCH --ntasks=1\n")
    return head + line + "".join(f"{extra}\n" for extra in more) + rest


def _variables(script: str, settings: SlurmSettings) -> dict[str, str | list[str]]:
    """What the head of a script says, by name."""
    folder, config = settings.folder, str(settings.folder / "settings.toml")
    database = re.match("postgresql|mysql", settings.storage or "")
    extras = [database[0]] if database else []
    extras += ["grpc"] if settings.quantization == "none" else ["grpc", "bnb"]
    variables: dict[str, dict[str, str | list[str]]] = {
        SCRIPT: {
            "STUDY": settings.study_name or folder.name,
            "CONFIG": config,
            "STUDY_DIR": str(settings.study_dir),
            "STORAGE": settings.storage or "",
            "WORKER_FLAGS": unsaid(settings),
        },
        "sweep.sbatch": {
            "SEARCH": ["--config", config],
            "PICK": settings.pick or "knee",
            "STUDY_DIR": str(folder / "sweep"),
            "STORAGE": settings.storage or "",
        },
        "training-loss.sbatch": {
            "FLAGS": ["--threads", str(settings.cpus)],
            "FOLDER": str(folder / "training-loss"),
        },
        "setup-node.sh": {"EXTRAS": ",".join(extras)},
    }
    return variables[script]


def submitted(script: Path) -> str:
    """What sbatch says to a script.

    Raises:
        StudyError: it refuses it, or is not there.
    """
    try:
        answer = subprocess.run(["sbatch", str(script)], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise StudyError(
            f"there is no sbatch on this machine: submit {script} where there is one"
        ) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or [f"exit code {error.returncode}"]
        raise StudyError(f"sbatch refused {script}: {lines[0]}") from error
    return answer.stdout.strip()


def script_folder() -> Path:
    """Where the scripts are: inside the package once installed, in a checkout beside it."""
    package = Path(heretic_kl.__file__).resolve().parent
    installed = package / "slurm"
    return installed if installed.is_dir() else package.parent / "slurm"


def _replaced(text: str, pattern: str, value: str) -> str:
    changed, count = re.subn(f"^{pattern}$", lambda m: m[1] + value, text, flags=re.MULTILINE)
    assert count == 1, pattern
    return changed


COMMAND = Command(
    "slurm --model MODEL --workers N [--submit] [--SETTING VALUE ...]",
    f"{SUMMARIES['slurm']}. The first job searches, refines, tests and saves, the others are "
    f"workers; each is requeued when it is pre-empted. `{PROGRAM} trials` shows how far it is. "
    "Beside it are scripts for a sweep, the training loss and a node without network.",
    run,
    SlurmSettings,
)
