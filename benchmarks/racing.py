"""What racing saves in a search with responses and first-token KL, on the demo model.

    python benchmarks/racing.py [--trials 100] [--threads 2] [--dtype auto]

A search measured whole and one raced by exact bounds, with the same seed. Racing gains where many
trials lie far behind the front. Teacher-forced objectives alone are no part of this: so few prompts
run in one tree of tokens, within which nothing can be left.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from machine import DTYPES, resolved_dtype, results_file, run_facts
from peers import SEED, our_search


def main() -> None:
    """Search both ways, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--out", type=Path, help="default: by dtype, in benchmarks/results")
    arguments = parser.parse_args()
    from heretic_kl.demo import ensure_demo_model

    model = Path(ensure_demo_model(notify=lambda message: None))
    torch.set_num_threads(arguments.threads)
    dtype = resolved_dtype(arguments.dtype)
    result = run_facts(SEED, arguments.threads, dtype, "optuna")
    result["model"] = f"demo model, 135M, {dtype}"
    ways = {"measured whole": {}, "racing by exact bounds": {"racing": True}}
    result["searches"] = {
        name: our_search(model, arguments.trials, dtype, generate=True, **options)
        for name, options in ways.items()
    }
    out = arguments.out or results_file("racing", dtype)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for name, found in result["searches"].items():
        rate, stopped = found["trials_per_minute"], found["stopped"]
        print(f"{name}: {rate:.1f} trials a minute, {stopped} of {found['trials']} stopped")


if __name__ == "__main__":
    main()
