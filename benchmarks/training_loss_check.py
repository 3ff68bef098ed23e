"""Does the training loss do what it should? One run a setting, then checks of them all.

    python benchmarks/training_loss_check.py run 0.3@2 --out FOLDER [--steps 50] [--base FOLDER]
    python benchmarks/training_loss_check.py check FOLDER

A setting is BETA or BETA@TEMPERATURE. `run` trains once, as benchmarks/training_loss.py describes,
and writes FOLDER/SETTING.json; one that is there already is not trained again. `check` reads the
five settings, prints a table and each check with whether it is met, writes FOLDER/checks.json, and
ends with 1 where one is not met. slurm/training-loss.sbatch runs both on a cluster.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

SETTINGS = ("0", "0.1", "0.3", "0.5", "0.3@2")
BY_BETA = SETTINGS[:4]
"""At temperature 1, beta rising."""
LEAST_SHARE_OF_FALL = 0.5
"""Of the fall of the held-out main loss at beta 0, which every setting must reach."""
ROUNDING = 1e-5
Runs = dict[str, dict[str, Any]]


def run(arguments: argparse.Namespace) -> None:
    """Train one setting and write what came of it, under its final name when it is whole."""
    target = arguments.out / f"{arguments.setting}.json"
    if target.exists():
        print(f"{target} is there already", flush=True)
        return
    import torch
    from machine import run_facts
    from training_loss import Bench, log

    from heretic_kl.demo import ensure_base_model

    torch.set_num_threads(arguments.threads)
    beta, _, temperature = arguments.setting.partition("@")
    base = arguments.base or ensure_base_model(notify=log)
    bench = Bench(base, arguments.limit, arguments.model)
    before = bench.measure(bench.demo)
    result = {
        **run_facts(arguments.seed, arguments.threads, "float32", "peft", "accelerate"),
        "setting": arguments.setting,
        "steps": arguments.steps,
        "sizes": bench.sizes,
        "before": before,
        **bench.run(float(beta), arguments.seed, arguments.steps, float(temperature or 1)),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    partial.replace(target)


def checks(runs: Runs) -> dict[str, bool]:
    """What must hold, in words, and whether it does."""
    benign = {name: one["benign_objective"] for name, one in runs.items()}
    fall = {name: one["before"]["main_loss"] - one["main_loss"] for name, one in runs.items()}
    figures = [
        value
        for one in runs.values()
        for value in (
            *(one[key] for key in ("main_loss", "benign_objective", "teacher_forced_kl")),
            *(value for entry in one["log"] for value in entry.values()),
        )
    ]
    logged = [
        entry["loss_kl"] for one in runs.values() for entry in one["log"] if "loss_kl" in entry
    ]
    ordered = [benign[name] for name in BY_BETA]
    return {
        "every figure is finite": all(map(math.isfinite, figures)),
        "the logged loss falls in every setting": all(map(_falls, runs.values())),
        "the held-out main loss falls in every setting": all(f > 0 for f in fall.values()),
        f"every setting reaches {LEAST_SHARE_OF_FALL:.0%} of that fall at beta 0": all(
            f >= LEAST_SHARE_OF_FALL * fall["0"] for f in fall.values()
        ),
        "no logged KL is below 0": all(value >= -ROUNDING for value in logged),
        "the KL's gradient is 0 while model and teacher are the same": all(
            one["gradient_norms"]["start"]["kl"] < ROUNDING for one in runs.values()
        ),
        "the held-out KL falls as beta rises": ordered == sorted(ordered, reverse=True),
        "the KL over response positions is lower at beta 0.5 than at 0": (
            runs["0.5"]["teacher_forced_kl"] < runs["0"]["teacher_forced_kl"]
        ),
        "at T = 2 the held-out KL is below that of beta 0": benign["0.3@2"] < benign["0"],
    }


def _falls(one: dict[str, Any]) -> bool:
    """Whether the second half of the logged losses is lower than the first."""
    losses = [entry["loss"] for entry in one["log"]]
    half = len(losses) // 2
    return half > 0 and statistics.fmean(losses[-half:]) < statistics.fmean(losses[:half])


def check(arguments: argparse.Namespace) -> int:
    """Print and write table and checks; 0 where all are met."""
    missing = [name for name in SETTINGS if not (arguments.folder / f"{name}.json").exists()]
    if missing:
        print(f"not there: {', '.join(missing)}", file=sys.stderr)
        return 1
    runs = {
        name: json.loads((arguments.folder / f"{name}.json").read_text("utf-8"))
        for name in SETTINGS
    }
    print("setting  main loss (before)  benign T² KL  KL over positions  refusals")
    for name, one in runs.items():
        print(
            f"{name:<8} {one['main_loss']:.3f} ({one['before']['main_loss']:.3f})      "
            f"{one['benign_objective']:.4f}        {one['teacher_forced_kl']:.4f}"
            f"             {one['refusals']}"
        )
    met = checks(runs)
    for what, holds in met.items():
        print(f"{'met' if holds else 'NOT MET'}: {what}")
    (arguments.folder / "checks.json").write_text(json.dumps(met, indent=2) + "\n", "utf-8")
    return 0 if all(met.values()) else 1


def main() -> int:
    """Run or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(required=True)
    running = actions.add_parser("run")
    running.add_argument("setting", choices=SETTINGS)
    running.add_argument("--out", type=Path, required=True)
    running.add_argument("--steps", type=int, default=50)
    running.add_argument("--seed", type=int, default=0)
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--limit", type=int, default=64, help="so many prompts of each set")
    running.add_argument("--base", type=Path, help="the base model, if it is built already")
    running.add_argument("--model", type=Path, help="the model to train (default: the demo model)")
    running.set_defaults(call=run)
    checking = actions.add_parser("check")
    checking.add_argument("folder", type=Path)
    checking.set_defaults(call=check)
    arguments = parser.parse_args()
    return int(arguments.call(arguments) or 0)


if __name__ == "__main__":
    sys.exit(main())
