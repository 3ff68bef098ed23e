"""Settings, where they come from, and their documentation. Imports no torch."""

from heretic_kl.config.reading import DEFAULT_CONFIG_FILE, load_settings, read_settings
from heretic_kl.config.settings import (
    DEFAULT_SCORERS,
    CommonSettings,
    ProgramSettings,
    Settings,
    moved,
)

__all__ = [
    "DEFAULT_CONFIG_FILE",
    "DEFAULT_SCORERS",
    "CommonSettings",
    "ProgramSettings",
    "Settings",
    "load_settings",
    "moved",
    "read_settings",
]
