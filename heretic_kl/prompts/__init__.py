"""Prompts: loading (files, folders, hub), sets by kind and use, the built-in sets.

`datasets` is imported only when a source needs it: built-in sets and .txt files do not.
"""

from heretic_kl.prompts.hub import dataset_revision
from heretic_kl.prompts.loading import PANEL, PANEL_VERSION, Prompt, fingerprint, load_prompts
from heretic_kl.prompts.source import DatasetSpec, PromptSource
from heretic_kl.prompts.specs import (
    BUILTIN_SPECS,
    KINDS,
    USES,
    Kind,
    resolve_specs,
    spec_of,
)

__all__ = [
    "BUILTIN_SPECS",
    "DatasetSpec",
    "PANEL",
    "PANEL_VERSION",
    "Prompt",
    "PromptSource",
    "Kind",
    "USES",
    "KINDS",
    "dataset_revision",
    "fingerprint",
    "load_prompts",
    "resolve_specs",
    "spec_of",
]
