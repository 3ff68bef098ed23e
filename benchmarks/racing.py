"""What racing and screening save in a search with responses and first-token KL.

    python benchmarks/racing.py [--trials 60] [--seeds 1,2,3] [--threads 2] [--dtype auto]
                                [--model FOLDER] [--screened-trials 240]

On the demo model, or on another one. A screened trial generates few tokens, so the screened search
may be given more trials than the others.

With each seed a search measured whole, one raced by exact bounds, and one whose trials generate
responses only where teacher forcing predicts few refusals (screening). Racing gains where many
trials lie far behind the front. Teacher-forced objectives alone are no part of this: so few prompts
run in one tree of tokens, within which nothing can be left.

The volume of a front: the share of [0, 1] refusals times [0, 1] nats of KL that it dominates. How
large it is after each trial stands beside how many tokens the search has generated until then, and
in the comparison how many times fewer tokens each way needs for a share of the volume that the
search measured whole ends with.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from generated_tokens import TokenHistory, tokens_to, with_volumes
from machine import DTYPES, resolved_dtype, results_file, run_facts
from peers import our_search

WAYS: dict[str, dict[str, bool]] = {
    "measured whole": {},
    "racing by exact bounds": {"racing": True},
    "screening": {"screening": True},
}
SHARES = (0.9, 0.95, 1.0)
"""Of the volume that the search measured whole ends with."""


def searches(
    model: Path, trials: int, screened: int, dtype: str, seed: int
) -> dict[str, dict[str, Any]]:
    """What each way found, in how much time and with how many tokens."""
    made = {}
    for name, options in WAYS.items():
        count = screened if options.get("screening") else trials
        with TokenHistory() as tokens:
            found = our_search(
                model,
                count,
                dtype,
                generate=True,
                seed=seed,
                startup_trials=trials // 2,
                tokens=tokens,
                **options,
            )
        history = with_volumes(tokens.trials)
        found["generated_tokens"], found["front_volume"] = tokens.count, history[-1]["volume"]
        found["volume_against_tokens"] = history
        print(
            f"seed {seed}, {name}: {found['trials_per_minute']:.1f} trials a minute, "
            f"front {found['front_volume']:.3f}, {tokens.count} tokens generated",
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
            "times_fewer_tokens_to_share_of_volume": {
                str(share): [
                    times_fewer_tokens(made[whole], made[name], share) for made in by_seed.values()
                ]
                for share in SHARES
            },
        }
        for name in WAYS
    }


def times_fewer_tokens(whole: dict[str, Any], way: dict[str, Any], share: float) -> float | None:
    """Tokens of the search measured whole over those of a way, to a share of its volume.

    None: the way never reaches it.
    """
    volume = share * whole["front_volume"]
    theirs, ours = (tokens_to(s["volume_against_tokens"], volume) for s in (whole, way))
    return None if theirs is None or ours is None else theirs / max(1, ours)


def main() -> None:
    """Search each way with each seed, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder (default: the demo model)")
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--screened-trials", type=int, help="of screening (default: as --trials)")
    parser.add_argument(
        "--seeds", type=lambda text: [*map(int, text.split(","))], default=[1, 2, 3]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--out", type=Path, help="default: by dtype, in benchmarks/results")
    arguments = parser.parse_args()
    from heretic_kl.demo import ensure_demo_model

    model = arguments.model or Path(ensure_demo_model(notify=lambda message: None))
    torch.set_num_threads(arguments.threads)
    dtype = resolved_dtype(arguments.dtype)
    result = run_facts(arguments.seeds, arguments.threads, dtype, "optuna")
    result["model"] = f"{arguments.model.name if arguments.model else 'demo model, 135M'}, {dtype}"
    screened = arguments.screened_trials or arguments.trials
    result["searches"] = {
        f"seed {seed}": searches(model, arguments.trials, screened, dtype, seed)
        for seed in arguments.seeds
    }
    result["against_whole"] = compared(result["searches"])
    out = arguments.out or results_file("racing", dtype)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["against_whole"], indent=2))


if __name__ == "__main__":
    main()
