"""Runs the wrong settings in one process of its own, and says of each whether torch was imported.

    python -m wrong_inputs.child FOLDER

writes to stdout, for each case, a line of JSON: exit code, stderr, whether torch is there.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

from heretic_kl.cli import main as cli
from wrong_inputs import settings, settings_files

CASES = [*settings.CASES, *settings_files.CASES]


def main(folder: Path) -> None:
    """Run all cases, each in a folder of its own."""
    for number, case in enumerate(CASES):
        place = folder / str(number)
        place.mkdir()
        case.prepare(place)
        os.chdir(place)
        errors = io.StringIO()
        with mock.patch.dict(os.environ, case.environment), contextlib.redirect_stderr(errors):
            code = cli.main(case.words)
        print(json.dumps([code, errors.getvalue(), "torch" in sys.modules]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
