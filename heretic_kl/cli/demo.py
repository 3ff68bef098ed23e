"""`heretic-kl demo`: the search on the demo model, with settings for a short run."""

from __future__ import annotations

from collections.abc import Sequence

from heretic_kl.cli import optimize
from heretic_kl.cli.command import PROGRAM, Command
from heretic_kl.config import Settings, load_settings
from heretic_kl.config.presets import DEMO_PRESET
from heretic_kl.errors import ConfigError


def run(words: Sequence[str]) -> int:
    """Search as the command line says; return the exit code."""
    settings = load_settings(words, defaults=DEMO_PRESET)
    if any(word.partition("=")[0] in ("--model", "-m") for word in words):
        raise ConfigError(
            f"`{PROGRAM} demo` runs on the demo model; for another model leave out the word demo"
        )
    return optimize.search(settings, demo=True)


COMMAND = Command(
    "demo [--SETTING VALUE ...]",
    "Searches for edits of the demo model, a small model that over-refuses, and saves the best.",
    run,
    Settings,
    preset=DEMO_PRESET,
    kept=optimize.TRIALS_KEPT,
)
