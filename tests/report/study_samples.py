"""A small study with everything in it that a report shows, and with text that means harm."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from heretic_kl.ablation import Operator, Refinement, SiteKey
from heretic_kl.kl import wilson_interval
from heretic_kl.scoring import Score, ScorerSpec
from heretic_kl.search import (
    UNEDITED,
    PlanStore,
    RunFile,
    Screened,
    SearchSpace,
    SearchStudy,
    keep_run,
    open_storage,
)

LAYERS = 6
HOSTILE = (
    "</p><script>document.title='owned'</script><img src=x onerror=alert(1)>\x00\x1b[31m\u202e"
)
OBJECTIVES = [ScorerSpec(n, n, "minimize", {}) for n in ("refusals", "teacher_forced_kl")]


def refusals(refused: int, total: int = 8) -> Score:
    interval = wilson_interval(refused, total)
    details = {"count": refused, "total": total, "empty": 0, "refused": list(range(refused))}
    details["degenerate_at"] = {str(total - 1): "loop"}
    share, text = refused / total, f"{refused}/{total}"
    return Score(share, text, interval=(interval.low, interval.high), details=details)


def kl(mean: float) -> Score:
    profile = [
        {"position": p, "mean": mean / (p + 1), "standard_error": mean / 9, "count": 8}
        for p in range(3)
    ]
    return Score(
        mean,
        f"{mean:.4f} ± {mean / 9:.4f} nats",
        standard_error=mean / 9,
        interval=(mean * 0.8, mean * 1.2),
        details={"profile": profile},
    )


SCREENED = 5
"""The trial that generates no responses, where there are so many."""
BASELINE = {"refusals": refusals(7), "teacher_forced_kl": kl(0.0)}


def scores(edit: Any) -> dict[str, Score]:
    """Stronger edits refuse less and cost more."""
    strength = sum(kernel.peak_weight for kernel in edit.kernels.values())
    return {
        "refusals": refusals(max(0, round(7 - 4 * strength))),
        "teacher_forced_kl": kl(strength),
    }


def outcomes(edits: Any, numbers: Any) -> list[dict[str, Score] | Screened]:
    """What is measured of trials; of the screened one its KL alone."""
    measured: list[dict[str, Score] | Screened] = []
    for edit, number in zip(edits, numbers, strict=False):
        of_edit = scores(edit)
        if number == SCREENED:
            of_edit.pop("refusals")
            measured.append(Screened(of_edit, {"refusals": 0.34}, promoted=False))
        else:
            measured.append(of_edit)
    return measured


def make_study(folder: Path, trials: int = 12, *, wanted: int | None = None) -> str:
    """A study named `s`: searched trials of which one is screened, two refined ones, tested ones.

    The second refined trial started from the screened one. The unedited model is tested too.
    """
    space = SearchSpace(LAYERS)
    with open_storage(None, folder, "s") as storage:
        study = SearchStudy(
            storage,
            "s",
            fingerprint={},
            space=space,
            objectives=OBJECTIVES,
            seed=0,
            startup_trials=99,
        )
        settings = {"model": "m", "trials": wanted or trials, "target_refusals": 0.05}
        keep_run(storage, "s", settings, space, OBJECTIVES, BASELINE)
        numbers = count()
        list(study.run(trials, lambda edits: outcomes(edits, numbers)))
        plan = {
            SiteKey(layer, "mlp", "down"): Operator(torch.full((4, 1), 0.5), torch.ones(4, 1))
            for layer in range(LAYERS)
        }
        digest = PlanStore(folder, "s").save(plan)
        refinement = Refinement(digest, 2, 40, "direction", 1, 0.05)
        outcome = {"refusals": refusals(0), "teacher_forced_kl": kl(0.05)}
        refined = study.add_refined(study.records[2], refinement, outcome, 5.0)
        if trials > SCREENED:
            worse = {"refusals": refusals(1), "teacher_forced_kl": kl(0.2)}
            start = study.records[SCREENED]
            study.add_refined(start, replace(refinement, start=SCREENED), worse, 5.0)
        study.keep_test_scores(UNEDITED, BASELINE)
        study.keep_test_scores(refined.number, {**outcome, "odd": Score(1.0, HOSTILE)})
        study.keep_test_scores(0, scores(study.records[0].edit))
    return "s"


def make_run_file(folder: Path) -> None:
    """What a run records beside the study `s`."""
    points = [[float(i), float(-i)] for i in range(4)]
    layer_values = [0.5 + layer / 20 for layer in range(LAYERS)]
    measures = ("auroc", "cosine", "silhouette", "difference_norm", "residual_norm")
    RunFile(folder, "s").update(
        {
            "model": "m",
            "versions": {"heretic-kl": "0", "torch": "2"},
            "machine": "Linux",
            "calibration": {"dtype": "float32"},
            "prompts": [
                {"kind": "harmful", "use": "test", "source": "f", "count": 8, "sha256": "ab"}
            ],
            "test_prompts": {
                "harmful": [f"bad {i} {HOSTILE}" for i in range(8)],
                "harmless": ["good one", f"good two {HOSTILE}"],
            },
            "directions": {
                "by_response": True,
                "harmful": 4,
                "harmless": 4,
                "layers": {name: layer_values for name in measures},
                "projections": [
                    {"layer": 3, "variance": 0.4, "refused": points, "answered": points[::-1]}
                ],
            },
            "responses": {
                "reference": {"harmless": ["The answer is 4.", HOSTILE], "harmful": ["I can't."]},
                "12": {"harmless": ["The answer is four.", HOSTILE], "harmful": ["VERY BAD TEXT"]},
                "0": {"harmless": ["A lemon.", "B"], "harmful": ["BAD TOO"]},
            },
            "commands": {"12": "heretic-kl --model m --pick trial=12"},
            "saved": {"trial": 12},
        }
    )
