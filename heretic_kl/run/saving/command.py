"""The command that finds a trial again: every setting that differs from its default."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from heretic_kl.config import Settings
from heretic_kl.engine import Calibration
from heretic_kl.export import SavedForm, portable

NOT_THE_TRIAL = frozenset(
    {
        *("model", "revision", "device", "device_map", "threads", "workers", "cache_memory_mb"),
        *("study_dir", "storage", "study_name", "quiet", "debug", "test_trials", "keep_responses"),
        *("trials", "pick", "save", "save_as", "overwrite"),
    }
)
"""Settings that change no trial, or that the command states in a form of its own."""
SEARCH = frozenset(
    {
        *("minutes", "refine", "startup_trials", "screening", "racing", "parallel_candidates"),
        *("target_refusals", "save_dtype", "edit", "refinement"),
    }
)
"""Settings that change how edits are searched and saved, and no score."""


def reproducing_command(
    settings: Settings,
    calibration: Calibration,
    *,
    base: str,
    revision: str | None,
    prompt_set: str,
    trial: int,
    refined: bool,
    name: str,
    form: SavedForm,
) -> str:
    """A line for a shell; its study holds the trial again, and it saves the same model.

    What the run found out for itself is stated, so that another machine does not find otherwise:
    dtype, batch size, response prefix, which prompts. Paths are cut to their last name; `base` and
    `name` (the model, the folder to save to) are fit to be published already.
    """
    words = ["heretic-kl", "--model", base]
    if revision is not None:
        words += ["--revision", revision]
    words += ["--kl-tokens", str(settings.kl_tokens)]
    words += ["--trials", str(settings.trials if refined else max(settings.trials, trial + 1))]
    words += _changed(settings, calibration, prompt_set, NOT_THE_TRIAL | {"kl_tokens"})
    words += ["--pick", f"trial={trial}", "--save", name]
    if form != Settings.model_fields["save_as"].default:
        words += ["--save-as", form]
    return shlex.join(words)


def evaluating_command(
    settings: Settings,
    calibration: Calibration,
    candidates: Sequence[str],
    *,
    base: str,
    prompt_set: str,
    use: str,
) -> str:
    """A line for a shell that measures the same candidates in the same way; see above."""
    words = ["heretic-kl", "evaluate", "--model", base, "--candidate", *portable(candidates)]
    if settings.revision is not None:
        words += ["--revision", settings.revision]
    words += ["--use", use, "--kl-tokens", str(settings.kl_tokens)]
    words += _changed(settings, calibration, prompt_set, NOT_THE_TRIAL | SEARCH | {"kl_tokens"})
    return shlex.join(words)


def _changed(
    settings: Settings, calibration: Calibration, prompt_set: str, left_out: Collection[str]
) -> list[str]:
    """Flags of all settings that differ from their defaults, and of what the run found out."""
    stated = {
        "dtype": calibration.dtype,
        "batch_size": calibration.batch_size,
        "response_prefix": calibration.response_prefix,
        "prompt_set": prompt_set,
    }
    defaults = Settings().model_dump(mode="json")
    values = portable({**settings.model_dump(mode="json"), **stated})
    return [
        word
        for key, value in values.items()
        if key not in left_out
        for path, changed in _changes((key,), value, defaults.get(key))
        for word in (_flag(path), _text(changed, path))
    ]


def _changes(
    path: tuple[str, ...], value: Any, default: Any
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths and values of what differs from a default, tables entered; a free one is one value."""
    if not isinstance(value, Mapping) or path == ("chat_template_kwargs",):
        if value != default:
            yield path, value
        return
    table = default if isinstance(default, Mapping) else {}
    for key, entry in value.items():
        yield from _changes((*path, key), entry, table.get(key))


def _flag(path: tuple[str, ...]) -> str:
    free = path[:1] == ("scorers",)  # keys that users and plug-ins name
    return "--" + ".".join(key if free else key.replace("_", "-") for key in path)


def _text(value: Any, path: tuple[str, ...]) -> str:
    """A value as the command line reads it: text as it is, everything else as JSON."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if path[:1] == ("scorers",) and path[2:3] == ("settings",) and _reads_as_json(value):
        return json.dumps(value, ensure_ascii=False)
    return value


def _reads_as_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return text.lstrip()[:1] in ("[", "{")
    return True
