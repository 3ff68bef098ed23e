"""What each part of refinement is worth, and what a step costs, on the demo model or another one.

    python benchmarks/refinement.py [--model FOLDER] [--steps 60] [--seeds 0,1] [--threads 2]

Every way of learning begins at the same gentle edit (half strength in all layers, one direction)
and takes as many steps. Stated is what validation prompts say of the edit that is kept: these
prompts stop training and set the threshold, so the figures compare ways and are no estimate of what
an edit costs. The results file holds one entry a model; other models' entries stay. `--render` does
no run: with `--guide PAGE` it writes the tables of all entries into a page.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import DTYPES, resolved_dtype, run_facts
from search_quality.table import write_between_markers

from heretic_kl import Session, Settings
from heretic_kl.ablation import EditParameters, Plan, WeightKernel
from heretic_kl.model import edited
from heretic_kl.refine import RefineOptions

LIMIT = 0.05
"""Mass that all ways aim at."""
BETA = 10.0
"""Of the plain weighted form."""
STRENGTH = 0.5
POSITION = 0.65
"""Where the direction is taken, as a share of the depth."""
TIMED = 5
"""Steps, and passes, whose median is stated."""


def main() -> None:
    """Refine in every way, write; print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--name", default="demo", help="of its entry in the results")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--limit", type=int, help="prompts of each kind and use, for a smoke test")
    parser.add_argument("--only", help="a regular expression of ways; others of the entry stay")
    default = Path(__file__).parent / "results/refinement.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--render", action="store_true", help="print the tables alone")
    parser.add_argument("--guide", type=Path, help="page that holds them between markers")
    arguments = parser.parse_args()
    if not arguments.render:
        run(arguments)
    tables = rendered(json.loads(arguments.out.read_text("utf-8")))
    print(tables)
    if arguments.guide:
        write_between_markers(arguments.guide, "refinement", tables)


def run(arguments: argparse.Namespace) -> None:
    """Refine one model in every way that is asked for, and write its entry."""
    torch.set_num_threads(arguments.threads)
    seeds = arguments.seeds or [0]
    dtype = resolved_dtype(arguments.dtype)
    model = arguments.model or demo_model()
    with tempfile.TemporaryDirectory() as folder:
        with Session(settings_for(model, dtype, folder, arguments.limit)) as session:
            session.search(0)
            entry = {
                "run": run_facts(seeds[0], arguments.threads, dtype, "optuna"),
                "steps": arguments.steps,
                "mass_limit": LIMIT,
                "prompts": _prompts(session),
                "step": step_cost(session),
                "ways": {
                    name: [way(session, start, options, arguments.steps, seed) for seed in seeds]
                    for name, (start, options) in ways(session).items()
                    if re.search(arguments.only or "", name)
                },
            }
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    entry["ways"] = {**results.get(arguments.name, {}).get("ways", {}), **entry["ways"]}
    results[arguments.name] = entry
    arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def demo_model() -> Path:
    """Where it is, built if need be."""
    from heretic_kl.demo import ensure_demo_model

    return Path(ensure_demo_model(notify=lambda message: None))


def settings_for(model: Path, dtype: str, folder: str, limit: int | None) -> Settings:
    """Built-in prompts; `limit` of each kind and use."""
    part = {"limit": limit} if limit else {}
    uses = {use: part for use in ("train", "validation")}
    return Settings(
        model=str(model),
        dtype=dtype,
        prompt_set="builtin",
        prompts={"harmful": uses, "harmless": uses},
        max_response_tokens=40,
        study_dir=folder,
        directions={"by_response": limit is None},
        scorers={"false_refusals": {"enabled": False}},
    )


def _prompts(session: Session) -> dict[str, int]:
    refiner = session.parts.refiner
    return {
        "train harmless": len(refiner.train.harmless),
        "train harmful": len(refiner.train.harmful),
        "validation harmless": len(refiner.validation.harmless),
        "validation harmful": len(refiner.validation.harmful),
    }


def gentle_start(session: Session, strength: float = STRENGTH) -> Plan:
    """The edit that every way begins at."""
    depth = len(session.parts.lm.architecture.layers) - 1
    kernel = WeightKernel(strength, POSITION * depth, strength, depth)
    edit = EditParameters(POSITION * depth, {"attention": kernel, "mlp": kernel}, "none")
    return session.parts.plan(edit)


def some_layers(session: Session, plan: Plan, first: float, end: float) -> Plan:
    """The plan in the layers between two shares of the depth alone."""
    layers = len(session.parts.lm.architecture.layers)
    return {k: op for k, op in plan.items() if first * layers <= k.layer < end * layers}


def ways(session: Session) -> dict[str, tuple[Plan, RefineOptions]]:
    """The default, and the default with one thing changed."""
    start, default = gentle_start(session), RefineOptions(mass_limit=LIMIT)
    return {
        "default": (start, default),
        "strengths alone": (start, replace(default, form="strength")),
        "factors of rank 1": (start, replace(default, form="factors", rank=1)),
        "factors of rank 4": (start, replace(default, form="factors", rank=4)),
        f"fixed beta {BETA:g}": (start, default.weighted(BETA)),
        "fixed threshold": (start, replace(default, mass_limit=1.0)),
        "layers 30 to 70%": (some_layers(session, start, 0.3, 0.7), default),
        "layers 40 to 70%": (some_layers(session, start, 0.4, 0.7), default),
        "layers 30 to 100%": (some_layers(session, start, 0.3, 1.0), default),
        "layers 30 to 70%, strength 1": (
            some_layers(session, gentle_start(session, 1.0), 0.3, 0.7),
            default,
        ),
        "openings alone": (start, replace(default, refusals_per_step=0)),
        "no average of parameters": (start, replace(default, average=0.0)),
    }


def way(
    session: Session, start: Plan, options: RefineOptions, steps: int, seed: int
) -> dict[str, Any]:
    """Learn once; what the kept edit has on validation prompts, and its counted refusals."""
    run = session.parts
    refined = run.refiner.refine(start, replace(options, steps=steps, seed=seed))
    (scores,) = run.suite.evaluate_objectives(run.engine, [refined.plan])
    refusals = scores["refusals"]
    print(f"{refined.best.kl:.4f} nats, mass {refined.best.mass:.3f}", flush=True)
    return {
        "seed": seed,
        "kl": refined.best.kl,
        "kl_standard_error": refined.best.kl_error,
        "mass": refined.best.mass,
        "step": refined.best.step,
        "refusals": refusals.details["count"],
        "harmful_prompts": refusals.details["total"],
        "checks": [_terms(check) for check in refined.checks],
    }


def _terms(check: Any) -> dict[str, float]:
    """A check's terms."""
    return {name: getattr(check, name) for name in ("step", "kl", "mass", "refused", "multiplier")}


def step_cost(session: Session) -> dict[str, float]:
    """Seconds of a step, and of a pass without gradients over the same prompts; and their ratio.

    And how many tokens such a pass runs through the layers.
    """
    from heretic_kl.refine.training import _Learner

    run, options = session.parts, RefineOptions(mass_limit=LIMIT)
    refiner, start = run.refiner, gentle_start(session)
    architecture = run.lm.architecture
    learner = _Learner(start, architecture, refiner.objective, refiner.train, options)
    harmless = list(refiner.train.harmless[: options.harmless_per_step])
    harmful = list(refiner.train.harmful[: options.harmful_per_step])

    def forward() -> None:
        with torch.no_grad(), edited(architecture, start):
            refiner.objective.terms(harmless, harmful)

    step, measured = _median(learner.step), _median(forward)
    tokens = tokens_of(architecture.layers[0], forward)
    return {
        "seconds": step,
        "forward_seconds": measured,
        "ratio": step / measured,
        "tokens": tokens,
    }


def tokens_of(layer: Any, act: Callable[[], None]) -> int:
    """How many tokens a layer takes while something is done."""
    counts: list[int] = []

    def count(module: Any, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        counts.append(states.numel() // states.shape[-1])

    hook = layer.register_forward_hook(count)
    try:
        act()
    finally:
        hook.remove()
    return sum(counts)


def _median(act: Callable[[], None]) -> float:
    act()
    seconds = []
    for _ in range(TIMED):
        begun = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def rendered(results: dict[str, Any]) -> str:
    """The tables of all models."""
    return "\n\n".join(f"`{name}`:\n\n{table(entry)}" for name, entry in results.items())


def table(entry: dict[str, Any]) -> str:
    """The ways side by side, medians over seeds."""
    lines = [
        f"| {entry['steps']} steps | KL, 16 positions (nats) | refusal mass | refusals by seed |",
        "|---|---|---|---|",
    ]
    for name, runs in entry["ways"].items():
        kl, mass = (statistics.median(run[key] for run in runs) for key in ("kl", "mass"))
        counts = ", ".join(f"{run['refusals']}/{run['harmful_prompts']}" for run in runs)
        lines.append(f"| {name} | {kl:.4f} | {mass:.3f} | {counts} |")
    step = entry["step"]
    lines.append(
        f"\nA step takes {step['ratio']:.1f} times as long as a pass without gradients over the "
        f"same prompts ({step['seconds']:.2f} s, {entry['run']['machine']['threads']} threads)."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
