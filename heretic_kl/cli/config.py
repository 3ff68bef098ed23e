"""`heretic-kl config`: the default configuration, which is config.default.toml. Reads nothing."""

from collections.abc import Sequence

from heretic_kl.cli.command import PROGRAM, SUMMARIES, Command
from heretic_kl.cli.output import observing, write, writes_json
from heretic_kl.errors import ConfigError


def run(words: Sequence[str]) -> int:
    """Print the default configuration."""
    if words:
        raise ConfigError(f"unexpected argument {words[0]!r}; `{PROGRAM} config` takes none")
    if not writes_json():
        write(default_configuration().removesuffix("\n"))
        return 0
    from heretic_kl.events import Result

    with observing() as observer:
        observer(Result("config", {"toml": default_configuration()}))
    return 0


def default_configuration() -> str:
    """Return the text of config.default.toml: every setting, the scorers' own included."""
    from heretic_kl.config import DEFAULT_SCORERS
    from heretic_kl.config.default_file import default_config_toml
    from heretic_kl.scoring import documented_settings

    return default_config_toml({name: documented_settings(name) for name in DEFAULT_SCORERS})


COMMAND = Command("config", f"{SUMMARIES['config']}.", run)
