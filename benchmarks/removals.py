"""Ways of removing a direction without learning: how much KL each costs at equal refusal mass.

    python benchmarks/removals.py [--model FOLDER --name NAME] [--threads 2]

Each way is measured at several strengths on validation prompts: the KL at 16 teacher-forced
positions on harmless ones, and the mean probability of opening with a refusal on harmful ones.
Between strengths both are interpolated, on log scales, to the KL at equal mass. The results file
holds one entry a model.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import DTYPES, resolved_dtype, run_facts
from refinement import POSITION, demo_model, settings_for
from torch import Tensor

from heretic_kl import Session
from heretic_kl.ablation import EditParameters, Operator, Plan, SiteKey, WeightKernel
from heretic_kl.refine import Check, RefineOptions
from heretic_kl.refine.training import evaluate

STRENGTHS = (0.15, 0.3, 0.5, 0.8, 1.2)
RIDGES = (1.0, 0.1)
"""Shares of the mean variance that are added before a second moment is inverted."""
BANDS = {"layers 0 to 40%": (0.0, 0.4), "40 to 70%": (0.4, 0.7), "70 to 100%": (0.7, 1.0)}
COMPARED_AT = (0.5, 0.3, 0.15)
"""Shares of the unedited model's refusal mass at which ways are compared."""

Way = Callable[[SiteKey, Tensor], Tensor | None]
"""What a site's output is multiplied by to find how much of the direction goes; None: no edit."""


def main() -> None:
    """Measure every way at every strength, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--name", default="demo", help="of its entry in the results")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--limit", type=int, help="prompts of each kind and use, for a smoke test")
    default = Path(__file__).parent / "results/removals.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = resolved_dtype(arguments.dtype)
    with tempfile.TemporaryDirectory() as folder:
        model = arguments.model or demo_model()
        settings = settings_for(model, dtype, folder, arguments.limit)
        with Session(settings) as session:
            session.search(0)
            entry = {
                "run": run_facts(0, arguments.threads, dtype, "optuna"),
                "unedited": _figures(_check(session, {})),
                "ways": curves(session),
            }
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    results[arguments.name] = entry
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(entry))


@dataclass(frozen=True)
class Moments:
    """Of a site's outputs over harmless training prompts and the reference's responses."""

    mean: Tensor  # (D,)
    second: Tensor  # (D, D), not centred


def curves(session: Session) -> dict[str, list[dict[str, float]]]:
    """Every way's figures at every strength."""
    run = session.parts
    moments = site_moments(session)
    layers = len(run.lm.architecture.layers)
    means = run.engine.residual_mean(run.prompts.of("train")["harmless"], 1.0)
    mean = means[round(POSITION * (layers - 1))].float()

    def within(low: float, high: float) -> Way:
        return lambda key, unit: unit if low * layers <= key.layer < high * layers else None

    ways: dict[str, Way] = {
        "orthogonal": lambda key, unit: unit,
        "attention alone": lambda key, unit: unit if key.component == "attention" else None,
        "mlp alone": lambda key, unit: unit if key.component == "mlp" else None,
        "direction without the harmless mean": lambda key, unit: _without(unit, mean),
        "oblique, the site's harmless mean kept": lambda key, unit: _without(
            unit, moments[key].mean
        ),
        **{
            f"oblique, least squares, ridge {ridge:g}": _least_squares(moments, ridge)
            for ridge in RIDGES
        },
        **{name: within(*ends) for name, ends in BANDS.items()},
    }
    measured: dict[str, list[dict[str, float]]] = {}
    for name, way in ways.items():
        measured[name] = []
        for strength in STRENGTHS:
            check = _check(session, removal(session, way, strength, name.startswith("direction")))
            measured[name].append({"strength": strength, **_figures(check)})
            print(name, measured[name][-1], flush=True)
    return measured


def removal(session: Session, way: Way, strength: float, both: bool = False) -> Plan:
    """`y -> y - strength r (d . y)` at every site; `both`: `d` takes the place of `r`, too."""
    depth = len(session.parts.lm.architecture.layers) - 1
    kernel = WeightKernel(1.0, POSITION * depth, 1.0, depth)
    edit = EditParameters(POSITION * depth, {"attention": kernel, "mlp": kernel}, "none")
    plan = {}
    for key, operator in session.parts.plan(edit).items():
        unit = operator.right[:, 0]
        reads = way(key, unit)
        if reads is not None:
            writes = reads / reads.norm() if both else unit
            reads = writes if both else reads
            plan[key] = Operator((-strength * writes)[:, None], reads[:, None])
    return plan


def _without(vector: Tensor, mean: Tensor) -> Tensor:
    return vector - mean * (mean @ vector) / (mean @ mean)


def _least_squares(moments: Mapping[SiteKey, Moments], ridge: float) -> Way:
    """What removes all of the direction and changes harmless outputs least, in squares."""

    def reads(key: SiteKey, unit: Tensor) -> Tensor:
        second = moments[key].second
        size = len(unit)
        damped = second + ridge * second.trace() / size * torch.eye(size)
        solved: Tensor = torch.linalg.solve(damped, unit)
        return solved / (solved @ unit)

    return reads


@torch.no_grad()
def site_moments(session: Session) -> dict[SiteKey, Moments]:
    """Over the last token of each harmless training prompt and the reference's response."""
    run = session.parts
    sums: dict[SiteKey, list[Any]] = {}
    place = {"first": 0}

    def noting(key: SiteKey) -> Callable[..., None]:
        def note(module: Any, inputs: Any, output: Any) -> None:
            written = output[0] if isinstance(output, tuple) else output
            rows = written[0, place["first"] :].float()
            count, total, second = sums.get(key, (0, 0.0, 0.0))
            sums[key] = [count + len(rows), total + rows.sum(0), second + rows.T @ rows]

        return note

    model = run.lm.model
    examples = run.refiner.train.harmless
    handles = [
        model.get_submodule(key.path).register_forward_hook(noting(key))
        for key in removal(session, lambda key, unit: unit, 1.0)
    ]
    try:
        for example in examples:
            place["first"] = example.sequence.scored.start
            model(torch.tensor([example.sequence.fed]))
    finally:
        for handle in handles:
            handle.remove()
    return {
        key: Moments(total / count, second / count) for key, (count, total, second) in sums.items()
    }


def _check(session: Session, plan: Plan) -> Check:
    refiner = session.parts.refiner
    where = session.parts.lm.architecture
    return evaluate(refiner.objective, where, plan, refiner.validation, RefineOptions())


def _figures(check: Check) -> dict[str, float]:
    return {"kl": check.kl, "kl_standard_error": check.kl_error, "mass": check.mass}


def kl_at(points: Sequence[Mapping[str, float]], mass: float) -> float | None:
    """The KL at a refusal mass, between strengths on log scales.

    Infinite where no strength reaches it, None where even the weakest exceeds it.
    """
    if points[0]["mass"] < mass:
        return None
    for before, after in zip(points, points[1:], strict=False):
        if before["mass"] >= mass >= after["mass"]:
            span = math.log(before["mass"]) - math.log(after["mass"])
            part = (math.log(before["mass"]) - math.log(mass)) / span if span else 0.0
            return math.exp((1 - part) * math.log(before["kl"]) + part * math.log(after["kl"]))
    return math.inf


def table(entry: Mapping[str, Any]) -> str:
    """KL of every way at equal refusal mass."""
    whole = entry["unedited"]["mass"]
    levels = [share * whole for share in COMPARED_AT]
    lines = [
        f"| removal | {' | '.join(f'KL at mass {level:.2f}' for level in levels)} |",
        f"|---|{'---|' * len(levels)}",
    ]
    for name, points in entry["ways"].items():
        cells = [_cell(kl_at(points, level)) for level in levels]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(kl: float | None) -> str:
    if kl is None:
        return "beyond it at the weakest"
    return f"{kl:.4f}" if kl < math.inf else "not reached"


if __name__ == "__main__":
    main()
