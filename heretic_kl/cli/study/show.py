"""`heretic-kl show`: all that is known of one trial, or what it responds. Changes nothing.

Its model is loaded for responses alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from heretic_kl.cli.command import SUMMARIES, Command
from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.output import observing, writes_json
from heretic_kl.cli.study.rerun_trial import session_beside
from heretic_kl.cli.study.settings import (
    PreviewSettings,
    ShowSettings,
    picked,
    read_named,
    rule_of,
    settings_of,
)
from heretic_kl.cli.study.trials import shown
from heretic_kl.config import Settings, read_settings
from heretic_kl.errors import ConfigError

if TYPE_CHECKING:
    from heretic_kl.scoring import PreviewedResponse
    from heretic_kl.search import StoredStudy, TrialRecord


def run(words: Sequence[str]) -> int:
    """Show the trial that the command line names, or compare it; return the exit code.

    Raises:
        HereticKLError: a wrong flag, study or trial; or the trial cannot be run again.
    """
