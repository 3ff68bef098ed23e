"""Who may import whom, how large things may be, and what the public surface is."""

import ast
import importlib
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest

import heretic_kl

ROOT = Path(heretic_kl.__file__).parent
HOME = ROOT.parent
PLUG_INS = HOME / "scorers"

LEAVES = {"errors", "files", "ranks", "_version"}
RUN = {"ablation", "engine", "export", "kl", "model", "prompts", "requests", "scoring", "search"}
ROOMS = {
    "kl": LEAVES,
    "ablation": LEAVES,
    "prompts": LEAVES,
    "requests": LEAVES | {"prompts"},
    "model": LEAVES | {"ablation", "kl", "prompts"},
    "judging": LEAVES | {"model", "prompts"},
    "engine": LEAVES | {"model", "ablation", "kl", "prompts", "requests"},
    "scoring": LEAVES | {"prompts", "judging", "kl", "kl_options", "requests", "ablation"},
    "search": LEAVES | {"ablation", "engine", "scoring"},
    "refine": LEAVES | {"ablation", "engine", "kl", "model", "prompts", "requests"},
    "export": LEAVES | {"model", "ablation", "search", "scoring"},
    "score": LEAVES
    | {"engine", "judging", "kl", "kl_options", "model", "prompts", "refine", "report", "requests"}
    | {"scoring"},
    "report": LEAVES | {"model", "search", "scoring", "ablation", "kl"},
    "events": LEAVES | {"search", "scoring"},
    "config": LEAVES | {"prompts", "kl_options"},
    "run": LEAVES | RUN | {"config", "events", "refine", "score"},
    "ui": LEAVES | {"events", "report", "search", "scoring", "ablation"},
    "cli": LEAVES
    | RUN
    | {"config", "demo", "events", "kl_options", "report", "run", "score", "testing", "ui"},
    "integrations": LEAVES | {"score", "kl", "model", "prompts"},
    "testing": LEAVES | {"model", "ablation", "prompts", "requests", "scoring"},
    "demo": LEAVES | {"model"},
    "errors": set(),
    "files": set(),
    "ranks": set(),
    "kl_options": set(),
    "_version": set(),
    "__main__": {"cli"},
    "__init__": LEAVES | {"config", "prompts", "run", "score", "scoring"},
}
"""Room -> what of ours it may import. Every file of the package belongs to one of them."""

OUTSIDE = {
    "optuna": {"search", "integrations"},
    "transformers": {
        "model",
        "engine",
        "export",
        "demo",
        "testing",
        "integrations",
        "judging",
    },
    "httpx": {"judging"},
    "httpx2": {"judging"},
    "questionary": {"ui"},
    "rich": {"ui", "report", "cli"},
    "vl_convert": {"report"},
    "jinja2": {"report"},
    "datasets": {"prompts"},
    "peft": {"demo", "model"},
    "heretic": {"integrations"},
    "llama_cpp": {"score"},
}
"""Library -> the rooms that may import it."""


LONG_FILES: dict[str, str] = {}
"""File of more than 400 lines -> why it is one file."""

LONG_FUNCTIONS = {
    "heretic_kl/model/loading/loader.py:load_model": "each argument has two lines of its own",
}
"""Function of more than 60 lines -> why it is one function."""

LARGE_FOLDERS: dict[str, str] = {}
"""Folder of more than 12 files (`__init__.py` aside) -> why it is one room."""

SAY_NOTHING = {"found", "own", "each", "given", "known", "told", "kept"}
"""Names that no local has."""

MOST_LINES = 50_812
"""Of the package and the plug-ins. Only a new capability raises it, by what that needs."""


def imports(path):
    """Dotted names that a file imports, relative ones resolved."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["heretic_kl", *path.relative_to(ROOT).parts[:-1]] if ROOT in path.parents else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module == "heretic_kl":
                yield from (f"heretic_kl.{alias.name}" for alias in node.names)


def files():
    return sorted(ROOT.rglob("*.py"))


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_the_architecture_page_shows_these_rooms():
    text = (HOME / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \|([\w, ]*)\|$", text, re.MULTILINE)
    shown = {room: set(filter(None, cell.replace(" ", "").split(","))) for room, cell in rows}
    apart = {*LEAVES, "__init__", "__main__"}
    assert shown == {room: may - LEAVES for room, may in ROOMS.items() if room not in apart}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_what_they_may(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "heretic_kl" and len(parts) > 1:
            assert parts[1] in ROOMS[room(path)] | {room(path)}, f"imports {name}"
        if parts[0] in OUTSIDE:
            assert room(path) in OUTSIDE[parts[0]], f"imports {name}"
        assert parts[0] != "scorers"


@pytest.mark.parametrize("path", sorted(PLUG_INS.glob("*.py")), ids=lambda p: p.name)
def test_plug_ins_import_only_the_scoring_surface(path):
    allowed = {"scoring", "kl", "prompts", "errors"}
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "heretic_kl":
            assert parts[1] in allowed, f"imports {name}"


def test_only_the_space_suggests():
    for path in files():
        called = {
            node.func.attr
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        if path.name != "space.py":
            assert not any(name.startswith("suggest_") for name in called), path


def test_nothing_prints_below_the_ui():
    for path in files():
        if room(path) == "ui":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_open_with_what_they_are_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no docstring"


def test_every_file_belongs_to_a_room_and_every_room_has_files():
    assert {room(path) for path in files()} == set(ROOMS)


def test_files_are_read_in_one_sitting():
    around = [path for part in ("tests", "benchmarks") for path in (HOME / part).rglob("*.py")]
    lengths = {name(path): len(lines(path)) for path in [*ours(), *around]}
    check({file: length for file, length in lengths.items() if length > 400}, LONG_FILES)
    assert statistics.median(lengths[name(path)] for path in ours()) <= 150


def test_functions_are_read_at_once():
    long = {
        f"{name(path)}:{function.name}": function.end_lineno - function.lineno + 1
        for path in ours()
        for function in functions(path)
        if function.end_lineno - function.lineno + 1 > 60
    }
    check(long, LONG_FUNCTIONS)


def test_folders_hold_about_a_dozen_files():
    sizes = Counter(name(path.parent) for path in ours() if path.name != "__init__.py")
    check({folder: size for folder, size in sizes.items() if size > 12}, LARGE_FOLDERS)
    assert len([path for path in ROOT.iterdir() if path.is_file()]) <= 10


def test_the_package_stays_small():
    assert sum(len(lines(path)) for path in ours()) <= MOST_LINES


def test_locals_say_what_they_hold():
    vague = [
        f"{name(path)}:{node.lineno} {local}"
        for path in ours()
        for function in functions(path)
        for node, local in locals_of(function)
        if local in SAY_NOTHING
    ]
    assert not vague


def ours():
    """Every Python file of the package and the plug-ins."""
    return [*files(), *sorted(PLUG_INS.glob("*.py"))]


def name(path):
    return path.relative_to(HOME).as_posix()


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def locals_of(function):
    """Names that a function binds, parameters included, with where."""
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node, node.id
        elif isinstance(node, ast.arg):
            yield node, node.arg


def check(too_large, exceptions):
    """Nothing is too large but what is listed, and nothing is listed without need."""
    assert too_large.keys() - exceptions.keys() == set(), too_large
    assert exceptions.keys() - too_large.keys() == set(), "an exception is no longer needed"


def test_public_names_are_there_and_nothing_else_is_listed():
    assert set(dir(heretic_kl)) == set(heretic_kl.__all__)
    for name in heretic_kl.__all__:
        assert getattr(heretic_kl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        _ = heretic_kl.Sesion


@pytest.mark.parametrize(
    "module",
    [
        "ablation",
        "engine",
        "export",
        "integrations",
        "judging",
        "kl",
        "model",
        "prompts",
        "score",
        "scoring",
        "search",
        "testing",
        "testing.zoo",
    ],
)
def test_every_room_has_a_curated_surface(module):
    loaded = importlib.import_module(f"heretic_kl.{module}")
    assert sorted(loaded.__all__) == sorted(set(loaded.__all__))
    assert all(hasattr(loaded, name) for name in loaded.__all__)
