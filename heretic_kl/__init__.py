"""Finds the least damaging edit that removes one behaviour from a language model.

    from heretic_kl import Session, Settings

    with Session(Settings(model="path/to/model", kl_tokens=3)) as session:
        session.search()
        session.refine()
        best = session.pick("knee")
        session.save(best, "edited-model", "merged")

Dimensions, in every docstring: P prompts, K candidates run together, T positions of a sequence,
N scored positions, V vocabulary, L layers, D residual width, R rank.

Names are imported when first used, so that `heretic-kl --help` never loads torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from heretic_kl._version import __version__

if TYPE_CHECKING:
    from heretic_kl.config import Settings
    from heretic_kl.errors import HereticKLError
    from heretic_kl.prompts import DatasetSpec, Prompt, load_prompts
    from heretic_kl.run import Session
    from heretic_kl.score import TeacherForcedKL
    from heretic_kl.scoring import Score, Scorer, ScorerSettings

__all__ = [
    "DatasetSpec",
    "HereticKLError",
    "Prompt",
    "Score",
    "Scorer",
    "ScorerSettings",
    "Session",
    "Settings",
    "TeacherForcedKL",
    "__version__",
    "load_prompts",
]

_HOME = {
    "DatasetSpec": "prompts",
    "HereticKLError": "errors",
    "Prompt": "prompts",
    "Score": "scoring",
    "Scorer": "scoring",
    "ScorerSettings": "scoring",
    "Session": "run",
    "Settings": "config",
    "TeacherForcedKL": "score",
    "load_prompts": "prompts",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
