"""What a command of `heretic-kl` is, and its `--help`. Runs nothing."""

from __future__ import annotations

import importlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from heretic_kl.config import ProgramSettings
from heretic_kl.config.help import help_entry, settings_help
from heretic_kl.ranks import launched

PROGRAM: Final = "heretic-kl"
SUMMARIES: Final = {
    "optimize": "Search for edits of --model (the default command)",
    "demo": "Run a short search on the demo model",
    "trials": "List the trials of a study",
    "show": "Show one trial of a study",
    "save": "Save the model of a trial of a study",
    "upload": "Put a saved model on the Hugging Face hub",
    "report": "Write one HTML page about a study",
    "reproduce": "Rebuild a saved model from its reproduce.json, and compare",
    "evaluate": "Measure edits that exist already, with every scorer",
    "worker": "Join a study that another process began",
    "storage": "Serve a database to workers on other machines",
    "slurm": "Write the batch script of a study for a SLURM cluster",
    "bench": "Run benchmarks of lm-eval on a trial of a study and on the original",
    "score": "Measure any models against a reference",
    "inspect": "Show a model's layers and sites, and what a run would edit",
    "scorer": "Write a new scorer, or test one",
    "config": "Print the default configuration for a config.toml",
    "events": "Print the JSON schema of what --json writes",
}
"""Every command; each is a module, imported when it is called."""
_FOLDERS: Final = {
    **dict.fromkeys(("trials", "show", "save", "report", "bench"), "study."),
    **dict.fromkeys(("reproduce", "evaluate", "upload"), "edits."),
    **dict.fromkeys(("worker", "storage", "slurm"), "workers."),
}
"""Of the modules of commands that share one."""
_VALUES: Final = (
    "Lists are words with commas or a JSON array; null unsets an optional setting. Flags override "
    "environment variables (HERETIC_KL_SEED, HERETIC_KL_EDIT__NORM), and these override the "
    "settings file."
)


@dataclass(frozen=True)
class Command:
    """A word after `heretic-kl`."""

    usage: str
    about: str
    run: Callable[[Sequence[str]], int]
    """Takes the arguments after the command, returns the exit code."""
    settings: type[ProgramSettings] | None = None
    preset: Mapping[str, Any] | None = None
    """Defaults other than the settings' own."""
    kept: str = ""
    """What an interrupt or a full disk leaves, for people."""
    first_words: tuple[str, ...] = ()
    """Flags that the first words without one stand for."""

    @property
    def json_may_name_file(self) -> bool:
        """Whether `--json FILE` is a flag of this command."""
        return self.settings is not None and "json_file" in self.settings.model_fields

    def words(self, words: Sequence[str]) -> list[str]:
        """The arguments, the first ones with their flags."""
        flagged: list[str] = []
        rest = list(words)
        for flag in self.first_words:
            if rest and not rest[0].startswith("-"):
                flagged += [flag, rest.pop(0)]
        return flagged + rest

    def help(self, *, everything: bool, commands: bool) -> str:
        """Return what `--help` or, with `everything`, `--help-all` shows."""
        width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 100))
        lines = [f"usage: {PROGRAM} {self.usage}", "", *textwrap.wrap(self.about, width)]
        if commands:
            entries = (help_entry(name, text, width) for name, text in SUMMARIES.items())
            lines += ["", "Commands:", *(line for entry in entries for line in entry)]
        if self.settings is None:
            return "\n".join(lines)
        options = {
            "-h, --help": "Show the settings that people use first",
            "--help-all": "Show every setting",
            "-V, --version": "Show the version",
            "--json": "Write events as JSON lines to stdout, and never ask",
            "-c, --config FILE": "Settings file [config.toml, where there is one]",
        }
        lines += ["", "Options:"]
        for usage, text in options.items():
            lines += help_entry(usage, text, width)
        settings = settings_help(
            self.settings, everything=everything, preset=self.preset, width=width
        )
        lines += ["", settings, "", "[x] is the default. --no-FLAG turns a switch off."]
        if everything:
            lines += textwrap.wrap(_VALUES, width)
        return "\n".join(lines)


def load_command(name: str) -> Command:
    """Import a command; its name is one of `SUMMARIES`."""
    module = importlib.import_module(f"{__package__}.{_FOLDERS.get(name, '')}{name}")
    command: Command = module.COMMAND
    return command


def wants_help(words: Sequence[str]) -> tuple[bool, bool]:
    """Return whether the arguments ask for help, and for all of it."""
    everything = "--help-all" in words
    return everything or "-h" in words or "--help" in words, everything


def at_terminal() -> bool:
    """Whether a person sits at both ends: stdin and stdout are terminals, of one process."""
    return sys.stdin.isatty() and sys.stdout.isatty() and launched() == 1
