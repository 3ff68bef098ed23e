"""`heretic-kl slurm`: the template `slurm/study.sbatch`, filled in. Searches nothing."""

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
    """Write the script, and submit it where that is asked for; return the exit code."""
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
        said = answer or f"written: submit it with sbatch {shlex.quote(str(script))}"
        observer(Notice(said))
        observer(Result("slurm", {"script": str(script), "sbatch": answer}))
    return 0


def write(settings: SlurmSettings) -> Path:
    """Write the settings file and the script, readable by their owner alone.

    Raises:
        StudyError: the folder cannot be written.
    """
    folder = settings.folder
    fields = set(SlurmSettings.model_fields) - set(Settings.model_fields)
    values = settings.model_dump(
        mode="json", exclude_defaults=True, exclude_none=True, exclude=NOT_OF_THE_RUN | fields
    )
    try:
        for name, text in (("settings.toml", tomlkit.dumps(values)), (SCRIPT, filled(settings))):
            files.write_text(folder / name, text)
            (folder / name).chmod(0o600)
    except OSError as error:
        raise StudyError(f"cannot write {str(folder)!r}: {error.strerror}") from error
    load_settings(["--config", str(folder / "settings.toml")])  # what was written is read alike
    return folder / SCRIPT


def filled(settings: SlurmSettings) -> str:
    """The script with the settings' values in its head."""
    folder = settings.folder
    requests = {
        "array": f"0-{settings.workers - 1}",
        "cpus-per-task": str(settings.cpus),
        "time": f"{settings.hours}:00:00",
        "output": str(folder / "%a.log"),
    }
    variables = {
        "STUDY": settings.study_name or folder.name,
        "CONFIG": str(folder / "settings.toml"),
        "STUDY_DIR": str(settings.study_dir),
        "STORAGE": settings.storage or "",
    }
    values = {name: shlex.quote(value) for name, value in variables.items()}
    values["WORKER_FLAGS"] = f"({shlex.join(unsaid(settings))})"
    text = (script_folder() / SCRIPT).read_text(encoding="utf-8")
    for name, value in requests.items():
        text = _replaced(text, rf"(#SBATCH --{name}=).*", value)
    for name, value in values.items():
        text = _replaced(text, rf"({name}=).*", value)
    more = [f"#SBATCH --partition={settings.partition}"] if settings.partition else []
    more += [f"#SBATCH --gpus-per-task={settings.gpus}"] if settings.gpus else []
    head, line, rest = text.partition("#SBATCH --ntasks=1\n")
    return head + line + "".join(f"{extra}\n" for extra in more) + rest


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
    f"workers; each is requeued when it is pre-empted. `{PROGRAM} trials` shows how far it is.",
    run,
    SlurmSettings,
)
