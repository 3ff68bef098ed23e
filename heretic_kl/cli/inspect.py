"""`heretic-kl inspect`: what a model is made of and what a run would edit. Searches nothing.

Takes the flags of a run, so that it shows the model exactly as a run with them would see it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from heretic_kl.errors import ConfigError, ExportError

USAGE = "usage: heretic-kl inspect MODEL [--json OUT] [--SETTING VALUE ...]"
ABOUT = """
Shows a model's layers, what in them writes to the residual stream, the proof that nothing else
does, what a run would edit and how much memory it takes. Takes the settings of a run
(`heretic-kl --help`), such as --dtype, --device, --edit.components or --edit.sites.

  --json OUT   everything as JSON; - : on stdout, no tables"""


def run_inspect(words: Sequence[str]) -> int:
    """Inspect as the command line says; return the exit code.

    Raises:
        HereticKLError: a wrong flag, or a model that cannot be edited; one line each.
    """
    from heretic_kl.config import load_settings

    target, rest = _json_target(words)
    if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
        raise ConfigError(f"--json {target}: there is no folder {str(Path(target).parent)!r}")
    model = rest.pop(0) if rest and not rest[0].startswith("-") else None
    settings = load_settings([*(["--model", model] if model else []), *rest])
    if settings.model is None:
        raise ConfigError(f"no model given; {USAGE}")

    import torch

    from heretic_kl.model import inspect_model
    from heretic_kl.report import InspectedAs, inspection_sections
    from heretic_kl.run.model import load_model_of
    from heretic_kl.ui.console import make_observer
    from heretic_kl.ui.measurement import print_raw, print_sections
    from heretic_kl.ui.terminal import make_console

    if settings.threads:
        torch.set_num_threads(settings.threads)
    results = make_console()
    with make_observer(quiet=True, results=results):
        found = inspect_model(load_model_of(settings))
    text = json.dumps(found.to_dict(), indent=2) + "\n"
    if target == "-":
        print_raw(results, text)
        return 0
    shown = InspectedAs(
        name=settings.model,
        components=settings.edit.components,
        cache_memory_mb=settings.cache_memory_mb,
    )
    print_sections(results, inspection_sections(found, shown))
    if target is not None:
        try:
            Path(target).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ExportError(f"cannot write {target!r}: {error.strerror}") from error
    return 0


def _json_target(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take --json off the words."""
    rest = list(words)
    for index, word in enumerate(rest):
        flag, equals, value = word.partition("=")
        if flag != "--json":
            continue
        del rest[index]
        if not equals:
            if index >= len(rest):
                raise ConfigError("--json needs a path, or - for stdout")
            value = rest.pop(index)
        if not value:
            raise ConfigError("--json needs a path, or - for stdout")
        return value, rest
    return None, rest
