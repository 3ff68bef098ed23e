"""Loads settings as the command line does, from files and variables of a test."""

from pathlib import Path

import pytest

from heretic_kl.config import Settings, load_settings
from heretic_kl.errors import ConfigError


def load(*argv: str, toml: str | None = None, env: dict[str, str] | None = None) -> Settings:
    if toml is not None:
        Path("config.toml").write_text(toml, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        return load_settings(argv)


def error_of(*argv: str, toml: str | None = None, env: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv, toml=toml, env=env)
    assert caught.value.exit_code == 2
    return str(caught.value)
