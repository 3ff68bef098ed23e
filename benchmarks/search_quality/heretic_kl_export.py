"""Saves trials of a finished study of this project as merged models, without measuring them.

python -m benchmarks.search_quality.heretic_kl_export STUDIES NUMBER NUMBER

Writes `trialNUMBER` in the current folder. The program's own `save` measures what it wrote, which
takes longer than the saving; here the judge measures.
"""

from __future__ import annotations

import sys
from pathlib import Path

from heretic_kl.cli.optimize import settle_process
from heretic_kl.cli.study.settings import SaveSettings, read_named, settings_of
from heretic_kl.config import read_settings
from heretic_kl.export import save_merged
from heretic_kl.run import Session


def main() -> None:
    """Save the trials that the command line names."""
    folder, *numbers = sys.argv[1:]
    words = ["--study-dir", folder, "--trial", numbers[0]]
    named = read_settings(SaveSettings, words)
    settings = settings_of(SaveSettings, words, named, read_named(named))
    settle_process(settings)
    with Session(settings) as session:
        for number in numbers:
            edit = session.pick(f"trial={number}").edit
            assert edit is not None  # a finished trial has one
            plan = session.parts.plan(edit)
            save_merged(session.parts.lm, plan, Path(f"trial{number}"), dtype=None, overwrite=True)


if __name__ == "__main__":
    main()
