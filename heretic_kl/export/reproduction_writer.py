"""`reproduce.json`: what it takes to do a saved edit again, and to check its files."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from heretic_kl.errors import ExportError
from heretic_kl.export.card import model_card
from heretic_kl.export.facts import ExportFacts, ScoreFacts
from heretic_kl.export.folder import write_text
from heretic_kl.export.portable import portable
from heretic_kl.files import sha256_file
from heretic_kl.scoring import Score

REPRODUCTION_FILE = "reproduce.json"
LEARNED_FILE = "reproduce/learned.safetensors"
"""Learned operators, in a folder of their own: some programs load every safetensors file they see
beside a model's."""
CARD_FILE = "README.md"
FORMAT = 3
"""2: named heretic-kl.json, without `identity` and `calibration`."""


def write_card(folder: Path, facts: ExportFacts) -> Path:
    """Write the model card, README.md, into a saved model's folder.

    Raises:
        ExportError: it cannot be written.
    """
    path = folder / CARD_FILE
    write_text(path, model_card(facts))
    return path


def write_reproduction(folder: Path, facts: ExportFacts) -> Path:
    """Write reproduce.json into a saved model's folder, with an index of the other files.

    Raises:
        ExportError: a file cannot be read or written.
    """
    path = folder / REPRODUCTION_FILE
    content = reproduction(facts)
    try:
        content["files"] = file_index(folder)
    except OSError as error:
        raise ExportError(
            f"the saved files cannot be read back: {error.strerror or error}"
        ) from error
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def reproduction(facts: ExportFacts) -> dict[str, Any]:
    """The facts as JSON-ready data, without paths of this machine and without secrets."""
    content = {
        "format": FORMAT,
        "name": facts.name,
        "form": facts.form,
        "saved_dtype": facts.saved_dtype,
        "base": {
            "name": facts.base_name,
            "on_hub": facts.base_is_hub_id,
            "revision": facts.base_revision,
        },
        "trial": {
            "number": facts.trial_number,
            "of": facts.trials,
            "pick_rule": facts.pick_rule,
            "parameters": facts.parameters,
            "edit": asdict(facts.edit),
            "validation_scores": {
                name: score.without_prompts().to_dict()
                for name, score in facts.validation_scores.items()
            },
        },
        "test_scores": {name: _scores(scores) for name, scores in facts.scores.items()},
        "measurement": {
            "kl_tokens": facts.kl_tokens,
            "test_kl_tokens": facts.test_kl_tokens or facts.kl_tokens,
            "metric_version": facts.metric_version,
            "noise_floor_nats": facts.noise_floor,
            "rounding_floor_nats": facts.rounding_floor,
            "merge_kl_nats": facts.merge_kl,
        },
        "lora": None if facts.lora is None else vars(facts.lora),
        "prompts": [vars(used) for used in facts.prompts],
        "identity": facts.identity,
        "calibration": facts.calibration,
        "seed": facts.seed,
        "settings": facts.settings,
        "versions": facts.versions,
        "platform": facts.platform,
    }
    cleaned: dict[str, Any] = _finite(portable(content))
    cleaned["command"] = facts.command  # publishable as it is; `/no_think` in it is no path
    return cleaned


def file_index(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file in a folder but the card and the reproduction file."""
    index: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (CARD_FILE, REPRODUCTION_FILE):
            index[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return index


def _scores(scores: ScoreFacts) -> dict[str, Any]:
    stages: dict[str, Score | None] = {
        "original": scores.original,
        "trial": scores.trial,
        "saved": scores.saved,
    }
    return {
        name: None if score is None else score.without_prompts().to_dict()
        for name, score in stages.items()
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
