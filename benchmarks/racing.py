"""What racing and screening save in a search with responses and first-token KL, on the demo model.

    python benchmarks/racing.py [--trials 60] [--seeds 1,2,3] [--threads 2] [--dtype auto]

With each seed a search measured whole, one raced by exact bounds, and one whose trials generate
responses only where teacher forcing predicts few refusals (screening). Racing gains where many
trials lie far behind the front. Teacher-forced objectives alone are no part of this: so few prompts
run in one tree of tokens, within which nothing can be left.

The volume of a front: the share of [0, 1] refusals times [0, 1] nats of KL that it dominates.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from machine import DTYPES, resolved_dtype, results_file, run_facts
from peers import our_search

WAYS: dict[str, dict[str, bool]] = {
    "measured whole": {},
    "racing by exact bounds": {"racing": True},
    "screening": {"screening": True},
}


def searches(model: Path, trials: int, dtype: str, seed: int) -> dict[str, Any]:
    """What each way found, in how much time."""
    from heretic_kl.search.progress.hypervolume import hypervolume

    made = {}
    for name, options in WAYS.items():
        found = our_search(model, trials, dtype, generate=True, seed=seed, **options)
        points = [tuple(point["objectives"]) for point in found["front"]]
        found["front_volume"] = hypervolume(points, (1.0, 1.0))
        print(
            f"seed {seed}, {name}: {found['trials_per_minute']:.1f} trials a minute, "
            f"front {found['front_volume']:.3f}",
            flush=True,
        )
        made[name] = found
    return made


def compared(by_seed: dict[str, Any]) -> dict[str, Any]:
    """Medians over seeds, each way against the search measured whole."""
    whole = next(iter(WAYS))
    return {
        name: {
            "trials_per_minute_ratio": statistics.median(
                made[name]["trials_per_minute"] / made[whole]["trials_per_minute"]
                for made in by_seed.values()
            ),
            "front_volume_ratio": statistics.median(
                made[name]["front_volume"] / made[whole]["front_volume"]
                for made in by_seed.values()
            ),
            "same_front": sum(
                made[name]["front"] == made[whole]["front"] for made in by_seed.values()
            ),
        }
        for name in WAYS
    }


def main() -> None:
    """Search each way with each seed, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument(
        "--seeds", type=lambda text: [*map(int, text.split(","))], default=[1, 2, 3]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--out", type=Path, help="default: by dtype, in benchmarks/results")
    arguments = parser.parse_args()
    from heretic_kl.demo import ensure_demo_model

    model = Path(ensure_demo_model(notify=lambda message: None))
    torch.set_num_threads(arguments.threads)
    dtype = resolved_dtype(arguments.dtype)
    result = run_facts(arguments.seeds, arguments.threads, dtype, "optuna")
    result["model"] = f"demo model, 135M, {dtype}"
    result["searches"] = {
        f"seed {seed}": searches(model, arguments.trials, dtype, seed) for seed in arguments.seeds
    }
    result["against_whole"] = compared(result["searches"])
    out = arguments.out or results_file("racing", dtype)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["against_whole"], indent=2))


if __name__ == "__main__":
    main()
