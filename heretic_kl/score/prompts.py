"""What both models are asked, from a source or as given. Knows nothing about models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from heretic_kl.errors import PromptError
from heretic_kl.prompts import DatasetSpec, Prompt, load_prompts

PromptsLike: TypeAlias = str | Path | DatasetSpec | Sequence[str | Prompt]
"""A source (file, folder, hub id, builtin:NAME), a part of one, or the prompts themselves."""

DEFAULT_PROMPTS = DatasetSpec("builtin:harmless", "test")


def chosen_prompts(prompts_or_source: PromptsLike) -> tuple[Prompt, ...]:
    """The prompts themselves.

    Raises:
        PromptError: the source cannot be read, or there are none.
    """
    if isinstance(prompts_or_source, str | Path):
        prompts_or_source = DatasetSpec(str(prompts_or_source))
    if isinstance(prompts_or_source, DatasetSpec):
        return tuple(load_prompts(prompts_or_source))
    prompts = tuple(p if isinstance(p, Prompt) else Prompt(p) for p in prompts_or_source)
    if not prompts:
        raise PromptError("no prompts are given: pass at least one")
    return prompts
