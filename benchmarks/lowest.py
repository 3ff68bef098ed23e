"""Runs the fast tests with the lowest versions that pyproject.toml declares; writes the outcome.

    python benchmarks/lowest.py --venv .venv-lowest --json benchmarks/results/lowest.json

torch is the exception: its bound is the version of constraints.txt (docs/decisions/019).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import venv
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
TESTS = [f"tests/{room}" for room in ("kl", "ablation", "config", "search", "scoring", "prompts")]
EXTRAS = ("tests/search/test_servers.py",)
"""What needs optional packages, which have bounds of their own."""
TOOLS = ("pytest", "hypothesis")
CONSTRAINTS = "lowest.txt"


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    """Package -> the lowest version declared, of requirements that apply to this Python.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    bounds = {}
    for requirement in requirements:
        specifier, _, marker = requirement.partition(";")
        if "python_version <" in marker and sys.version_info >= (3, 11):
            continue
        match = re.fullmatch(r"([\w.-]+)>=([\w.]+)", specifier.strip())
        if match is None:
            raise ValueError(f"{requirement!r} must have the form name>=version")
        bounds[match[1]] = match[2]
    return bounds


def installed(python: Path, packages: list[str]) -> dict[str, str]:
    """Version of each package in a virtual environment."""
    code = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [python, "-c", code, *packages], check=True, capture_output=True, text=True
    )
    return dict(json.loads(done.stdout))


def run_tests(python: Path) -> tuple[int, str]:
    """Exit code and last line of pytest over the fast tests, on one thread."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pytest", "-q", "-p", "no:anyio", "-m", "not e2e and not gpu", *TESTS]
    command += [f"--ignore={path}" for path in EXTRAS]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, re.sub(r" in [\d.]+s.*", "", last).strip("= ")


def main() -> int:
    """Install, test, write the outcome; return pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--no-install", action="store_true", help="the environment is complete")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = lower_bounds(project["dependencies"])
    python = options.venv / "bin" / "python"
    if not options.no_install:
        venv.create(options.venv, with_pip=True)
        constraints = options.venv / CONSTRAINTS
        pins = [f"{name}=={version}\n" for name, version in bounds.items()]
        constraints.write_text("".join(pins), encoding="utf-8")
        pip = [python, "-m", "pip", "install", "--quiet", "--constraint", constraints]
        subprocess.run([*pip, *bounds, *TOOLS], check=True)
    code, summary = run_tests(python)
    outcome = {
        "python": platform.python_version(),
        "declared": bounds,
        "installed": installed(python, [*bounds, *TOOLS]),
        "tests": TESTS,
        "exit_code": code,
        "summary": summary,
    }
    options.json.write_text(json.dumps(outcome, indent=2) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
