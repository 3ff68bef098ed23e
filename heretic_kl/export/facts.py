"""Everything a saved model's card and reproduction file state, as plain values. Renders nothing."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from heretic_kl._version import __version__
from heretic_kl.ablation import EditParameters
from heretic_kl.scoring import KL_TOKENS, Meaning, Score

PACKAGES = ("torch", "transformers", "optuna", "safetensors", "datasets")
CARD_NAMES = ("README.original.md", "README.md")
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class PromptFacts:
    """One set of prompts that was used."""

    kind: str
    """`harmful` or `harmless`."""
    use: str
    """`train`, `validation` or `test`."""
    source: str
    """Where from, for people: `builtin, harmful train[:256]`."""
    count: int
    sha256: str
    """Fingerprint of the prompts in order, hex."""
    revision: str | None = None
    """Commit of a dataset of the hub, where it is known."""


@dataclass(frozen=True)
class ScoreFacts:
    """One score on the test prompts, three times measured."""

    original: Score | None
    trial: Score | None
    """With the trial's operators in force."""
    saved: Score | None
    """Of the saved model, read back from disk."""
    kind: str | None = None
    """Of the test prompts it was measured on; None: it has prompts of its own."""
    unit: str = ""
    """Of the values, as the scorer names it: `nats`, `share`."""
    role: str = "monitor"
    """Of the scorer: `minimize`, `maximize` or `monitor`."""
    meaning: Meaning = Meaning()
    """What the scorer says that it counts."""


@dataclass(frozen=True)
class LoraFacts:
    """How near an adapter comes to the edit.

    Errors are Frobenius norms of what is missing over that of the change; 0 where it is exact.
    """

    rank: int
    exact: bool
    """No site is approximated."""
    relative_error: float
    """Over all sites together."""
    worst_relative_error: float


@dataclass(frozen=True)
class ExportFacts:
    """What was edited, how, what it costs and how to do it again."""

    name: str
    """Of the saved model, for a title."""
    form: Literal["merged", "lora"]
    base_name: str
    """Hub id, or the bare name of a folder or file; never a path."""
    base_is_hub_id: bool
    base_revision: str | None
    """The commit, where it is known."""
    saved_dtype: str
    """`bfloat16`, or `as stored in the original`."""
    trial_number: int
    trials: int
    """How many the study held when this one was picked."""
    pick_rule: str | None
    """None: picked by hand."""
    parameters: Mapping[str, Any]
    """The trial's, as the search space names them."""
    edit: EditParameters
    layers: int
    scores: Mapping[str, ScoreFacts]
    """On the test prompts, by scorer."""
    validation_scores: Mapping[str, Score]
    """The trial's, on the validation prompts."""
    kl_tokens: int
    """N in trials: of `validation_scores`, the floors and `merge_kl`."""
    metric_version: int
    """Of the KL: what two versions measure is not compared."""
    noise_floor: float | None
    """Nats, of batching alone."""
    rounding_floor: float | None
    """Nats, of rounding to bfloat16."""
    merge_kl: float | None
    """Nats, KL(operators || saved model)."""
    prompts: tuple[PromptFacts, ...]
    settings: Mapping[str, Any]
    """All of them, JSON-ready."""
    command: str
    """What reproduces the trial, fit to be published: see `portable`."""
    seed: int
    versions: Mapping[str, str]
    platform: str
    license: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """What the original's card states: `license`, `license_name`, `license_link`."""
    lora: LoraFacts | None = None
    by_response: bool = True
    """Directions are from harmful prompts that were refused and harmless ones that were answered;
    False: from all training prompts of either kind."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """Fingerprints of all that the edit depends on: weights, tokenizer, prompts, scorers."""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    """What the run found out: dtype, batch size, response prefix, device, threads, prompt set."""
    test_kl_tokens: int | None = None
    """N on test prompts, for scorers that have none of their own; None: `kl_tokens`."""

    def tokens_of(self, name: str) -> int:
        """N of a scorer's `scores`."""
        scores = self.scores[name]
        measured = (scores.saved or scores.trial or Score(None, "")).details.get(KL_TOKENS)
        return int(measured or self.test_kl_tokens or self.kl_tokens)


def installed_versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    versions = {"heretic-kl": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def machine() -> str:
    """System and processor, for instance `Linux x86_64`; no name of the machine."""
    return f"{platform.system()} {platform.machine()}"


def stated_license(folder: Path | None) -> dict[str, str | tuple[str, ...]]:
    """What the model card in a folder says of its licence in its front matter; {} if nothing.

    In a folder that `save_merged` wrote, the card read is the original's.
    """
    if folder is None:
        return {}
    for name in CARD_NAMES:
        path = folder / name
        if path.is_file():
            return _license_entries(path.read_text(encoding="utf-8-sig", errors="replace"))
    return {}


def _license_entries(card: str) -> dict[str, str | tuple[str, ...]]:
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data = ModelCard(card, ignore_metadata_errors=True).data
    except (ValueError, YAMLError):
        return {}  # front matter that is no YAML states nothing
    entries: dict[str, str | tuple[str, ...]] = {}
    for key in LICENSE_KEYS:
        value = data.get(key)
        if isinstance(value, list):
            entries[key] = tuple(str(item) for item in value)
        elif value:
            entries[key] = str(value)
    return entries
