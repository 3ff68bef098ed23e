"""`heretic-kl reproduce`: a saved model rebuilt from its reproduction file, and compared.

The file may come from anyone: `heretic_kl.export.reproduction_reader` says what is taken from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.config import Settings, moved, read_settings
from heretic_kl.config.flag_parser import given_flags
from heretic_kl.config.tables import Location, setting
from heretic_kl.errors import ConfigError, ReproductionError

if TYPE_CHECKING:
    from heretic_kl.export import Reproduction
    from heretic_kl.run.saving.rebuild import Comparison

DIFFERS = 4
"""Exit code: the rebuilt model is another one."""
FOLDER = Path("reproduced-model")


class ReproduceSettings(Settings):
    """The file; whatever else is set replaces what it says."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "File": ("file",),
        **moved(Settings.headings, "Saving", ("save", "save_as")),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("File", "Saving")

    file: Location | None = setting(
        None, "reproduce.json, or the folder of a saved model (required)", metavar="FILE"
    )


def run(words: Sequence[str]) -> int:
    """Rebuild the model that the command line names; return the exit code.

    Raises:
        HereticKLError: a file, model or setting is wrong; one line each.
    """
    named = read_settings(ReproduceSettings, words, stored={})
    if named.file is None:
        raise ConfigError("no file given: name a reproduce.json, or the folder of a saved model")

    from heretic_kl.events import Notice, Result
    from heretic_kl.export import read_reproduction
    from heretic_kl.run import Session
    from heretic_kl.run.saving.rebuild import rebuild

    wanted = read_reproduction(named.file)
    settings, left_out = _settings(words, wanted)
    settle_process(settings)
    with ExitStack() as stack:
        scratch = stack.enter_context(TemporaryDirectory(prefix="heretic-kl-"))
        observer = stack.enter_context(observing(quiet=settings.quiet))
        for line in left_out:
            observer(Notice(f"not taken from the file: {line}"))
        settings = settings.model_copy(update={"study_dir": Path(scratch)})
        session = stack.enter_context(Session(settings, observer))
        assert settings.save is not None
        _, comparison = rebuild(session.parts, wanted, settings.save, overwrite=settings.overwrite)
        observer.settle()
        observer(Result("reproduce", _plain(comparison)))
        if not writes_json():
            _print(comparison)
    return DIFFERS if comparison.verdict == "differs" else 0


def _settings(words: Sequence[str], wanted: Reproduction) -> tuple[Settings, tuple[str, ...]]:
    """What the file says and the command line replaces; what was left out of the file."""
    stored, left_out = wanted.taken_settings()
    flags = given_flags(ReproduceSettings, words)
    if "model" in flags:
        stored.pop("revision", None)
    elif "model" not in stored:
        raise ReproductionError(
            f"{wanted.path}: the original, {wanted.base.name!r}, was a local folder or file: name "
            "yours with --model"
        )
    settings = read_settings(ReproduceSettings, words, stored=stored)
    values = settings.model_dump(exclude={"file"})
    values.update(
        save=settings.save or FOLDER,
        pick=None,
        storage=None,
        study_name=None,
        keep_responses="none",
    )
    return Settings(**values), left_out


def _plain(comparison: Comparison) -> dict[str, Any]:
    """The comparison, JSON-ready."""
    content = asdict(comparison)
    content["match"] = comparison.verdict != "differs"
    content["scores"] = {
        name: {"then": None if then is None else then.to_dict(), "now": now.to_dict()}
        for name, (then, now) in comparison.scores.items()
    }
    return content


def _print(comparison: Comparison) -> None:
    from heretic_kl.report import align, label
    from heretic_kl.ui.terminal import make_console, say

    console = make_console()
    matches = comparison.verdict != "differs"
    head = f"MATCH, {comparison.verdict}" if matches else "DIFFERS"
    say(console, f"{head}: {comparison.basis}", "bold green" if matches else "bold red")
    if comparison.kl is not None:
        floor = f"noise floor {comparison.noise_floor:.2g}"
        say(console, f"  KL between rebuilt and saved model: {comparison.kl:.2g} nats, {floor}")
    rows = [["test prompts", "in the file", "rebuilt"]]
    for name, (then, now) in comparison.scores.items():
        rows.append([label(name), "not there" if then is None else then.text, now.text])
    for line in align(rows):
        say(console, f"  {line}")
    if comparison.files:
        say(console, f"  files that differ: {', '.join(comparison.files)}")
    for difference in comparison.differences:
        say(console, f"  {difference.what}: then {difference.then}, now {difference.now}")


COMMAND = Command(
    "reproduce FILE [--save FOLDER] [--SETTING VALUE ...]",
    f"{SUMMARIES['reproduce']}: directions are found again, the edit is applied, saved and "
    "measured. Nothing that the file holds is run: plug-ins, a model's code, templates and paths "
    "have to be named on the command line.",
    run,
    ReproduceSettings,
    first_words=("--file",),
)
