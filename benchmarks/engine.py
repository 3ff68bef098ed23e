"""Where a teacher-forced trial's time goes, how far that is from arithmetic, how it grows.

    python benchmarks/engine.py [--dtype float32] [--threads 2] [--repeats 3]

On the demo model, built-in prompts, medians; `trial_parts.py` says how the parts of a trial are
told apart. `plots.py` draws the curves.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from demo_model import as_in_a_run, demo_model
from machine import DTYPES, resolved_dtype, results_file, run_facts
from trial_parts import breakdown, median_seconds

SEED, BATCH = 1, 16
NOTHING_SHARED = {"prefix_problem": "off", "tree_problem": "off"}


class Bench:
    """The demo model, its prompts, and candidates of any lowest layer."""

    def __init__(self, repeats: int, dtype: str) -> None:
        from heretic_kl.prompts import DatasetSpec, load_prompts

        self.lm, self.cache_bytes = as_in_a_run(demo_model(dtype))
        self.repeats = repeats
        kinds, splits = ("harmless", "harmful"), ("validation", "test", "train")
        specs = [DatasetSpec(f"builtin:{kind}", split) for split in splits for kind in kinds]
        self.prompts = tuple(prompt for spec in specs for prompt in load_prompts(spec))
        generator = torch.Generator().manual_seed(SEED)
        self.direction = torch.randn(self.lm.architecture.width, generator=generator)

    def engine(self, **options: Any) -> Any:
        """A new one, as all measurements here but those of responses use it."""
        from heretic_kl.engine import Engine

        lm = self.lm.limited(**options)
        return Engine(lm, batch_size=BATCH, cache_bytes=self.cache_bytes)

    def request(self, prompts: int, positions: int, reduction: Any = None) -> Any:
        """Teacher-forced, of the first so many prompts."""
        from heretic_kl.kl import DivergenceReduction
        from heretic_kl.requests import TeacherForcedRequest

        if prompts > len(self.prompts):
            raise ValueError(f"there are only {len(self.prompts)} prompts, asked for {prompts}")
        chosen = self.prompts[:prompts]
        return TeacherForcedRequest(chosen, positions, reduction or DivergenceReduction())

    def plan(self, lowest: int, weight: float = 0.3) -> dict:
        """An edit of all layers from the lowest on."""
        from heretic_kl.ablation import ablation_operator

        sites = self.lm.architecture.facts()
        return {k: ablation_operator(self.direction, weight) for k in sites if k.layer >= lowest}

    def trial(
        self, prompts: int, positions: int, lowest: int, candidates: int = 1, **options: Any
    ) -> float:
        """Median seconds a candidate; what later ones start from is there before they count."""
        engine, request = self.engine(**options), self.request(prompts, positions)
        plans = [self.plan(lowest, 0.05 * (1 + index)) for index in range(candidates)]
        engine.measure_many(plans[:1], [request])
        work = lambda: engine.measure_many(plans, [request])  # noqa: E731
        return median_seconds(work, self.repeats) / candidates

    def raced(self, prompts: int, positions: int) -> dict[str, float]:
        """Seconds of a trial that half its prompts show to be beaten, whole and left there."""
        from heretic_kl.requests import PartialRows

        engine, request, plan = self.engine(), self.request(prompts, positions), self.plan(0)

        def watch(_candidate: int, known: list) -> bool:
            part = known[0]
            if not isinstance(part, PartialRows):
                return False
            return len(part.rows.prompt_index.unique()) >= prompts / 2

        def measure(*watching: object) -> object:
            return engine.measure_many([plan], [request], *watching)

        whole = median_seconds(measure, self.repeats)
        return {"whole": whole, "raced": median_seconds(lambda: measure(watch), self.repeats)}


def slope(costs: dict[int, float]) -> float:
    """Least-squares slope of seconds over size."""
    mean_x, mean_y = statistics.mean(costs), statistics.mean(costs.values())
    above = sum((x - mean_x) * (y - mean_y) for x, y in costs.items())
    return above / sum((x - mean_x) ** 2 for x in costs)


def curves(bench: Bench) -> dict[str, Any]:
    """How seconds grow with each size."""
    by_positions = {n: bench.trial(40, n, 0) for n in (1, 2, 4, 8, 16, 32)}
    without = {n: bench.trial(40, n, 0, **NOTHING_SHARED) for n in (1, 32)}
    by_prompts = {p: bench.trial(p, 8, 12) for p in (20, 40, 80, 160, 320)}
    by_layer = {layer: bench.trial(80, 8, layer) for layer in (0, 6, 12, 18, 24)}
    by_candidates = {k: bench.trial(40, 8, 12, k) for k in (1, 2, 4, 8, 16)}
    return {
        "seconds_by_positions_40_prompts_all_layers": by_positions,
        "seconds_per_position_slope": slope(by_positions),
        "n32_over_n1": by_positions[32] / by_positions[1],
        "seconds_by_positions_without_shared_prefix": without,
        "n32_over_n1_without_shared_prefix": without[32] / without[1],
        "seconds_by_prompts_8_positions_from_layer_12": by_prompts,
        "seconds_per_prompt_slope": slope(by_prompts),
        "seconds_by_first_edited_layer_80_prompts_8_positions": by_layer,
        "seconds_per_layer_slope": slope(by_layer),
        "seconds_a_candidate_by_candidates_at_once_40_prompts_from_layer_12": by_candidates,
    }


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: by dtype, in benchmarks/results")
    arguments = parser.parse_args()
    dtype = resolved_dtype(arguments.dtype)
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.repeats, dtype)
    result = run_facts(SEED, arguments.threads, dtype)
    layers = len(bench.lm.architecture.layers)
    result |= {
        "model": f"demo model, 135M, {dtype}, {layers} layers",
        "layers": layers,
        "breakdown": [breakdown(bench, 80, 8, lowest) for lowest in (0, 12)],
        **curves(bench),
        "racing_160_prompts_8_positions": bench.raced(160, 8),
    }
    out = arguments.out or results_file("engine", dtype)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
