"""Teacher-forced KL inside other people's optimizers and trainers. Measures nothing itself.

    heretic_plugin.py         a scorer file for Heretic (named by path, not imported from here)
    optuna_objective.py       an objective for any Optuna study
    transformers_callback.py  a curve beside the loss of any `transformers.Trainer`
    trainer.py                the KL as a training loss in any `transformers.Trainer`

Names are imported when first used: an objective needs no trainer.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heretic_kl.errors import MeasurementError
    from heretic_kl.integrations.optuna_objective import KLObjective
    from heretic_kl.integrations.trainer import TeacherForcedKLMixin
    from heretic_kl.integrations.transformers_callback import TeacherForcedKLCallback

__all__ = [
    "HERETIC_PLUGIN",
    "KLObjective",
    "MeasurementError",
    "TeacherForcedKLCallback",
    "TeacherForcedKLMixin",
]

HERETIC_PLUGIN = f"{Path(__file__).with_name('heretic_plugin.py')}:TeacherForcedKLScorer"
"""What Heretic's config names; importing the file itself needs Heretic."""

_HOME = {
    "KLObjective": "heretic_kl.integrations.optuna_objective",
    "MeasurementError": "heretic_kl.errors",
    "TeacherForcedKLCallback": "heretic_kl.integrations.transformers_callback",
    "TeacherForcedKLMixin": "heretic_kl.integrations.trainer",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
