"""Finds scorer classes by short name or file. Imports plug-ins by path, never as a package."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from heretic_kl.errors import ConfigError, ScorerError
from heretic_kl.files import expanded
from heretic_kl.scoring.scorer import Scorer, ScorerSettings
from heretic_kl.scoring.sources import source_digest


def scorer_folder() -> Path:
    """Where our own scorers are: inside the package once installed, in a checkout beside it."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "scorers"
    return installed if installed.is_dir() else package.parent / "scorers"


def built_in_scorers() -> tuple[str, ...]:
    """Short names of the scorers that come with the package."""
    files = scorer_folder().glob("*.py")
    return tuple(sorted(path.stem for path in files if not path.stem.startswith("_")))


METHODS = {
    "__init__": ("name", "settings"),
    "check": (),
    "prepare": ("context",),
    "requests": (),
    "score": ("results",),
}
"""Of a scorer -> what each is called with."""


def load_scorer_class(use: str) -> type[Scorer[Any]]:
    """The class a config entry names.

    Args:
        use: a short name (`refusals`) or `path/to/file.py:Class`; the class may be left out if
            the file holds only one scorer.

    Raises:
        ScorerError: no such scorer, file or class, or the file cannot be imported.
    """
    path, class_name = _locate(use)
    module = _import_file(path, use)
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Scorer)
        and value.__module__ == module.__name__
    ]
    if class_name is not None:
        classes = [scorer_class for scorer_class in classes if scorer_class.__name__ == class_name]
    if len(classes) != 1:
        what = f"class {class_name!r}" if class_name else "exactly one Scorer class"
        raise ScorerError(f"scorer {use!r}: {path} does not define {what}")
    _check_methods(classes[0], use)
    return classes[0]


def _check_methods(kind: type[Scorer[Any]], use: str) -> None:
    """Refuse a class that could not be built or asked, before a model is loaded for it."""
    if missing := sorted(kind.__abstractmethods__):
        raise ScorerError(f"scorer {use!r}: {kind.__name__} does not define {', '.join(missing)}")
    for method, names in METHODS.items():
        try:
            inspect.signature(getattr(kind, method)).bind("self", *names)
        except TypeError:
            wanted = ", ".join(("self", *names))
            raise ScorerError(
                f"scorer {use!r}: {kind.__name__}.{method} must take ({wanted})"
            ) from None


def build_scorer(name: str, use: str, settings: Mapping[str, Any]) -> Scorer[Any]:
    """A scorer with its validated settings.

    Raises:
        ScorerError: the class cannot be found.
        ConfigError: its settings are unknown or out of range.
    """
    kind = load_scorer_class(use)
    try:
        validated = kind.Settings.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigError(_settings_message(name, kind.Settings, error)) from None
    return kind(name, validated)


def scorer_code(use: str) -> str:
    """sha256 of a scorer's file and the code it relies on: edited code measures something else."""
    path, _ = _locate(use)
    return source_digest(path)


def _locate(use: str) -> tuple[Path, str | None]:
    file, colon, class_name = use.rpartition(":")
    if not colon or not file.endswith(".py"):
        file, class_name = use, ""
    if file.endswith(".py"):
        path = expanded(file)
        if not path.is_file():
            raise ScorerError(f"scorer {use!r}: no such file {file!r}")
        return path.resolve(), class_name or None
    names = built_in_scorers()
    if file not in names:
        close = difflib.get_close_matches(file, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ScorerError(
            f"unknown scorer {use!r}{hint} Known: {', '.join(names)}, or path/to/file.py:Class"
        )
    return scorer_folder() / f"{file}.py", None


def _import_file(path: Path, use: str) -> ModuleType:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"heretic_kl_scorer_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        first = (str(error).splitlines() or [""])[0]
        raise ScorerError(
            f"scorer {use!r}: {path} cannot be imported: {type(error).__name__}: {first}"
        ) from error
    return module


def _settings_message(name: str, kind: type[ScorerSettings], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    where = f"scorers.{name}.settings.{key}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        keys = _known_keys(kind, first["loc"][:-1])
        close = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(keys)}"
        return f"unknown setting {where}: {hint}"
    return f"{where} = {first.get('input')!r}: {first['msg']}"


def _known_keys(kind: type[Any], path: Sequence[str | int]) -> list[str]:
    """Keys of the table (a model or a dataclass) at a path below a settings class."""
    for part in path:
        annotation = _fields(kind)[str(part)].annotation
        alternatives = (annotation, *get_args(annotation))  # Table or Table | None
        kind = next(t for t in alternatives if hasattr(t, "__pydantic_fields__"))
    return list(_fields(kind))


def _fields(kind: type[Any]) -> dict[str, FieldInfo]:
    fields: dict[str, FieldInfo] = kind.__pydantic_fields__
    return fields


def documented_settings(use: str) -> dict[str, tuple[Any, str]]:
    """Default and description of every setting of a scorer, by name."""
    fields = load_scorer_class(use).Settings.model_fields
    return {
        name: (field.get_default(call_default_factory=True), field.description or "")
        for name, field in fields.items()
    }
