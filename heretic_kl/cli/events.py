"""`heretic-kl events`: the JSON schema of what `--json` writes. Reads nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from heretic_kl.cli.command import PROGRAM, SUMMARIES, Command
from heretic_kl.cli.output import observing, write, writes_json
from heretic_kl.errors import ConfigError


def run(words: Sequence[str]) -> int:
    """Print the schema."""
    if words:
        raise ConfigError(f"unexpected argument {words[0]!r}; `{PROGRAM} events` takes none")
    from heretic_kl.events import Result
    from heretic_kl.ui.json_lines import event_schema

    if writes_json():
        with observing() as observer:
            observer(Result("events", event_schema()))
    else:
        write(json.dumps(event_schema(), indent=2))
    return 0


COMMAND = Command("events", f"{SUMMARIES['events']}.", run)
