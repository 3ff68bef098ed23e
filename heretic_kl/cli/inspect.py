"""`heretic-kl inspect`: what a model is made of and what a run would edit. Searches nothing.

Takes the flags of a run, so that it shows the model exactly as a run with them would see it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar

from heretic_kl.cli.command import Command
from heretic_kl.cli.output import STDOUT, check_json_file, observing, writes_json
from heretic_kl.config import Settings, moved, read_settings
from heretic_kl.config.tables import Location, json_file
from heretic_kl.errors import ConfigError, ExportError
from heretic_kl.files import redacted

UNUSED = ("trials", "minutes", "refine", "pick", "save", "save_as", "study_dir")
USAGE = "inspect MODEL [--json FILE] [--SETTING VALUE ...]"


class InspectSettings(Settings):
    """The settings of a run, and where the result goes."""

    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "Output": ("json_file",),
        **moved(Settings.headings, "Without effect here", UNUSED),
    }
    shown_first: ClassVar[tuple[str, ...]] = ("Output", "Basics")

    json_file: Location | None = json_file()


def run(words: Sequence[str]) -> int:
    """Inspect as the command line says; return the exit code.

    Raises:
        HereticKLError: a wrong flag, or a model that cannot be edited; one line each.
    """
    settings = read_settings(InspectSettings, words)
    target = settings.json_file
    if settings.model is None:
        raise ConfigError(f"no model given; usage: heretic-kl {USAGE}")
    check_json_file(target)

    import torch

    from heretic_kl.events import Result
    from heretic_kl.model import inspect_model
    from heretic_kl.report import inspection_sections
    from heretic_kl.run.setup.load import load_model_of
    from heretic_kl.ui.print_tables import print_raw, print_sections
    from heretic_kl.ui.terminal import make_console

    if settings.threads:
        torch.set_num_threads(settings.threads)
    results = make_console()
    with observing(quiet=True) as observer:
        inspection = inspect_model(load_model_of(settings))
        observer(Result("inspect", inspection.to_dict()))
    text = json.dumps(inspection.to_dict(), indent=2) + "\n"
    if target == STDOUT:
        print_raw(results, text)
        return 0
    if not writes_json():
        limits = settings.edit.components, settings.cache_memory_mb
        print_sections(results, inspection_sections(inspection, settings.model, *limits))
    if target is not None:
        try:
            target.write_text(redacted(text), encoding="utf-8")
        except OSError as error:
            raise ExportError(f"cannot write {str(target)!r}: {error.strerror}") from error
    return 0


COMMAND = Command(
    USAGE,
    "Shows a model's layers, the modules that write to the residual stream, the check that "
    "nothing else does, what a run would edit, and how much memory it takes.",
    run,
    InspectSettings,
    first_words=("--model",),
)
