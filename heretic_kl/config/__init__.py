"""Settings, where they come from, and their documentation. Imports no torch."""

from heretic_kl.config.settings import (
    DEFAULT_CONFIG_FILE,
    DEFAULT_SCORERS,
    Settings,
    load_settings,
)

__all__ = ["DEFAULT_CONFIG_FILE", "DEFAULT_SCORERS", "Settings", "load_settings"]
