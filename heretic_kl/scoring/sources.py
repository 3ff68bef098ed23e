"""Which source files decide what a scorer measures. Reads them; imports nothing."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
NAME = PACKAGE.name


def source_digest(path: Path, package: Path = PACKAGE) -> str:
    """sha256 over a scorer's file and all of this package that it relies on, in hex."""
    digest = hashlib.sha256()
    for file in source_files(path, package):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def source_files(path: Path, package: Path = PACKAGE) -> tuple[Path, ...]:
    """The file, and the files of this package whose names it imports, however far down.

    Names are followed through the `__init__.py` that only hands them on, so that a scorer
    depends on the rule it uses and not on all of `heretic_kl.scoring`.
    """
    queue, visited = [path], {path}
    while queue:
        for file in _imported_files(queue.pop(), package):
            if file not in visited:
                visited.add(file)
                queue.append(file)
    return (path, *sorted(visited - {path}))


def _imported_files(path: Path, package: Path) -> Iterator[Path]:
    names: list[tuple[str, str | None]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] == NAME:
                file = _defining_file(module, name, package)
                if file is not None:
                    yield file


def _defining_file(module: str, name: str | None, package: Path) -> Path | None:
    """The file that defines a name of a module, or the module itself."""
    if name is not None:
        submodule = _module_file(f"{module}.{name}", package)
        if submodule is not None:
            return submodule
    file = _module_file(module, package)
    if file is None or file.name != "__init__.py" or name is None:
        return file
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return _defining_file(node.module, alias.name, package)
    return file


def _module_file(module: str, package: Path) -> Path | None:
    place = package.joinpath(*module.split(".")[1:])
    candidates = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)
