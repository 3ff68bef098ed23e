"""What the package offers and what it may import."""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import heretic_kl.kl as kl

FILES = sorted(Path(kl.__file__).parent.glob("*.py"))


def test_every_public_name_is_there_once_and_documented():
    assert all(hasattr(kl, name) for name in kl.__all__)
    assert len(set(kl.__all__)) == len(kl.__all__)
    for name in kl.__all__:
        entry = getattr(kl, name)
        if inspect.isclass(entry) or inspect.isfunction(entry):
            assert entry.__doc__, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_nothing_but_torch_the_standard_library_errors_and_files(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            root = name.split(".")[0]
            at_the_top = node in tree.body
            assert (
                root == "torch"
                or root in sys.stdlib_module_names
                or name in ("heretic_kl.errors", "heretic_kl.files")
                or name.startswith("heretic_kl.kl")
                or (root == "safetensors" and not at_the_top)
            ), f"{path.name} imports {name}"


def test_the_legend_lists_every_file():
    assert kl.__doc__ is not None
    for path in FILES:
        assert path.name == "__init__.py" or path.name in kl.__doc__
