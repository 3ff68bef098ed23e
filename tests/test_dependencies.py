"""What is imported is declared, and nothing else."""

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_OURS_TO_DECLARE = {"heretic"}  # the plug-in file runs inside Heretic
MODULES = {
    "tomli": "tomli",
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
    "httpx": "httpx",
    "llama_cpp": "llama-cpp-python",
    "lm_eval": "lm-eval",
    "vl_convert": "vl-convert-python",
    "vllm": "vllm",
}
"""Import name -> package that brings it: of an extra, or pinned exactly by pydantic."""


def name_of(requirement: str) -> str:
    return re.split(r"[<>=;\s\[]", requirement)[0].lower().replace("_", "-")


def imported(folder: Path) -> dict[str, Path]:
    """Module of another package -> a file that imports it."""
    modules = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            modules |= {name.split(".")[0]: path for name in names}
    ours = sys.stdlib_module_names | {"heretic_kl", "tomllib"} | NOT_OURS_TO_DECLARE
    return {name: path for name, path in modules.items() if name not in ours}


@pytest.mark.parametrize("folder", ["heretic_kl", "scorers"])
def test_what_is_imported_is_declared(folder: str) -> None:
    declared = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    declared |= {name_of(r) for name in extras if name != "dev" for r in extras[name]}
    packages = packages_distributions()
    for module, path in imported(ROOT / folder).items():
        names = {MODULES.get(module, "")} | {name_of(name) for name in packages.get(module, [])}
        assert names & declared, f"{path} imports {module}, which pyproject.toml does not declare"


def test_what_is_declared_is_imported_or_said_why() -> None:
    modules = {**imported(ROOT / "heretic_kl"), **imported(ROOT / "scorers")}
    packages = packages_distributions()
    used = {name_of(name) for module in modules for name in packages.get(module, [])}
    used |= {MODULES[module] for module in modules if module in MODULES}
    # Others import these on our behalf: transformers for device_map and GGUF files, optuna.
    for_others = {"accelerate", "gguf", "scipy", "greenlet"}
    unused = {name_of(r) for r in PROJECT["dependencies"]} - used - for_others
    assert not unused


def test_the_citation_states_this_version() -> None:
    from heretic_kl import __version__

    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in text
