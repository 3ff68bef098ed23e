"""A study of made-up scores."""

import json

from heretic_kl.scoring import Score, ScorerSpec
from heretic_kl.search import (
    SearchSpace,
    SearchStudy,
)

OBJECTIVES = (
    ScorerSpec("refusals", "refusals", "minimize", {}),
    ScorerSpec("kl", "teacher_forced_kl", "minimize", {}),
)
SPACE = SearchSpace(layers=12)


def study(storage, *, fingerprint=None, seed=7, startup=8, objectives=OBJECTIVES, **more):
    return SearchStudy(
        storage,
        "s",
        fingerprint=fingerprint or {"model": "m"},
        space=SPACE,
        objectives=objectives,
        seed=seed,
        startup_trials=startup,
        **more,
    )


def scores_of(edit):
    """Stronger edits refuse less and cost more."""
    strength = sum(kernel.peak_weight * kernel.reach for kernel in edit.kernels.values())
    refusals = 1 / (1 + strength)
    return {"refusals": Score(refusals, f"{refusals:.2f}"), "kl": Score(strength, "x")}


def each(measure):
    """An `evaluate` that measures edits one after the other."""
    return lambda edits: [measure(edit) for edit in edits]


evaluate = each(scores_of)


def parameters(records):
    return [json.dumps(record.parameters, sort_keys=True) for record in records]
