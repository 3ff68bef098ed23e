"""Where a teacher-forced trial's time goes, how far that is from arithmetic, how it grows.

    python benchmarks/engine.py [--threads 2] [--repeats 3]

On the demo model in float32, built-in prompts, medians. Arithmetic: floating-point operations of
the matrix products that a trial needs, divided by the rate of a matrix product of the model's own
shape measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from machine import library_versions, machine_facts

SEED, BATCH = 1, 16


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of some runs after one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


class Bench:
    """The demo model, its prompts, and candidates of any lowest layer."""

    def __init__(self, repeats: int) -> None:
        from heretic_kl.demo import ensure_demo_model
        from heretic_kl.model import ModelSource, load_model
        from heretic_kl.prompts import DatasetSpec, load_prompts

        folder = ensure_demo_model(notify=lambda message: None)
        self.lm = load_model(ModelSource(str(folder)), dtype="float32")
        self.repeats = repeats
        kinds, splits = ("harmless", "harmful"), ("search", "report", "train")
        specs = [DatasetSpec(f"builtin:{kind}", split) for split in splits for kind in kinds]
        self.prompts = tuple(prompt for spec in specs for prompt in load_prompts(spec))
        generator = torch.Generator().manual_seed(SEED)
        self.direction = torch.randn(self.lm.architecture.width, generator=generator)

    def plan(self, lowest: int, weight: float = 0.3) -> dict:
        """An edit of all layers from the lowest on."""
        from heretic_kl.ablation import ablation_operator

        sites = self.lm.architecture.facts()
        return {k: ablation_operator(self.direction, weight) for k in sites if k.layer >= lowest}

    def trial(self, prompts: int, positions: int, lowest: int, candidates: int = 1) -> float:
        """Median seconds a candidate."""
        from heretic_kl.engine import Engine
        from heretic_kl.kl import row_statistics
        from heretic_kl.requests import TeacherForcedRequest

        engine = Engine(self.lm, batch_size=BATCH, trunk_bytes=2**30)
        request = TeacherForcedRequest(self.prompts[:prompts], positions, row_statistics)
        plans = [self.plan(lowest, 0.05 * (1 + index)) for index in range(candidates)]
        engine.measure_many(plans[:1], [request])
        work = lambda: engine.measure_many(plans, [request])  # noqa: E731
        return median_seconds(work, self.repeats) / candidates

    def raced(self, prompts: int, positions: int) -> dict[str, float]:
        """Seconds of a trial that half its prompts show to be beaten, whole and raced."""
        from heretic_kl.engine import Engine
        from heretic_kl.kl import row_statistics
        from heretic_kl.requests import PartialRows, TeacherForcedRequest

        engine = Engine(self.lm, batch_size=BATCH, trunk_bytes=2**30)
        request = TeacherForcedRequest(self.prompts[:prompts], positions, row_statistics)
        plan = self.plan(0)

        def watch(_candidate: int, known: list) -> bool:
            part = known[0]
            if not isinstance(part, PartialRows):
                return False
            return len(part.rows.prompt_index.unique()) >= prompts / 2

        def measure(*watching: object) -> object:
            return engine.measure_many([plan], [request], *watching)

        whole = median_seconds(measure, self.repeats)
        return {"whole": whole, "raced": median_seconds(lambda: measure(watch), self.repeats)}

    def drafted(self, prompts: int, tokens: int) -> dict[str, float]:
        """Median seconds of answers of a row of ever stronger edits, token by token and drafted."""
        from heretic_kl.engine import Engine, answering
        from heretic_kl.requests import ResponseRequest
        from heretic_kl.scoring import RefusalRule

        request = ResponseRequest(self.prompts[-prompts:], tokens, RefusalRule())
        plans = [self.plan(0, 0.1 * (1 + index)) for index in range(6)]
        found = {}
        own = answering.guessing_problem
        for name, problem in (("token by token", lambda lm, way: "off"), ("drafted", own)):
            answering.guessing_problem = problem
            engine = Engine(self.lm, batch_size=prompts)
            engine.measure(None, [request])
            works = [lambda p=plan, e=engine: e.measure(p, [request]) for plan in plans]
            found[name] = statistics.median([seconds_of(work) for work in works][1:])
        answering.guessing_problem = own
        return found

    def breakdown(self, prompts: int, positions: int, lowest: int) -> dict[str, object]:
        """Seconds of each part of one trial, and the arithmetic it needs."""
        from heretic_kl.engine import Engine
        from heretic_kl.kl import row_statistics
        from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
        from heretic_kl.kl.terms import row_blocks
        from heretic_kl.model import PrefixCache
        from heretic_kl.requests import TeacherForcedRequest

        lm, chosen = self.lm, self.prompts[:prompts]
        engine = Engine(lm, batch_size=BATCH, trunk_bytes=2**30)
        request = TeacherForcedRequest(chosen, positions, row_statistics)
        plan = self.plan(lowest)
        total = median_seconds(lambda: engine.measure(plan, [request]), self.repeats)
        passes = engine._candidate_passes(chosen, positions, None)
        batches, reference = passes._laid_out().batches, engine.reference(chosen, positions)
        blocks = list(row_blocks(reference.rows, lm.head.vocabulary, MAX_LOGIT_ELEMENTS))
        hidden = reference.hidden
        logits = lm.head.logits(hidden[blocks[0]])
        tokens = reference.row_tokens[blocks[0]]
        share = reference.rows / len(tokens)  # the blocks' sizes differ only in the last one
        with torch.no_grad():
            prefix = median_seconds(lambda: PrefixCache(lm, batches.prefix), self.repeats)
        layers = median_seconds(lambda: passes.hidden_states([plan]), self.repeats)
        head = median_seconds(lambda: [lm.head.logits(hidden[b]) for b in blocks], self.repeats)
        statistics_ = share * median_seconds(
            lambda: row_statistics(logits, logits + 0.01, tokens), self.repeats
        )
        run = len(lm.architecture.layers) - lowest
        weights = sum(p.numel() for p in lm.architecture.layers[0].parameters() if p.ndim == 2)
        operations = 2 * run * weights * batches.fed_tokens
        head_operations = 2 * 2 * reference.rows * lm.head.weight.numel()
        rate = matrix_rate(BATCH * 25, lm.architecture.width, self.repeats)
        least = (operations + head_operations) / rate
        return {
            "prompts": prompts,
            "positions": positions,
            "first_edited_layer": lowest,
            "fed_tokens": batches.fed_tokens,
            "scored_rows": reference.rows,
            "seconds": {
                "total": total,
                "layers_prefix_included": layers,
                "prefix_through_all_layers": prefix,
                "head_of_candidate": head,
                "head_of_reference": head,
                "statistics": statistics_,
                "rest": total - layers - 2 * head - statistics_,
            },
            "operations": {"layers": operations, "heads": head_operations},
            "matrix_product_per_second": rate,
            "least_seconds_by_arithmetic": least,
            "total_over_least": total / least,
        }


def seconds_of(work: Callable[[], object]) -> float:
    """Of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matrix_rate(rows: int, width: int, repeats: int) -> float:
    """Floating-point operations a second of (rows, D) @ (D, 2.67 D), a gate projection's shape."""
    a, b = torch.randn(rows, width), torch.randn(width, width * 8 // 3)
    work = lambda: [a @ b for _ in range(50)]  # noqa: E731
    return 50 * 2 * rows * width * b.shape[1] / median_seconds(work, repeats)


def slope(costs: dict[int, float]) -> float:
    """Least-squares slope of seconds over size."""
    mean_x, mean_y = statistics.mean(costs), statistics.mean(costs.values())
    above = sum((x - mean_x) * (y - mean_y) for x, y in costs.items())
    return above / sum((x - mean_x) ** 2 for x in costs)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/engine.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    bench = Bench(arguments.repeats)
    by_positions = {n: bench.trial(40, n, 0) for n in (1, 2, 4, 8, 16, 32)}
    by_prompts = {p: bench.trial(p, 8, 12) for p in (20, 40, 80, 160, 320)}
    by_layer = {layer: bench.trial(80, 8, layer) for layer in (0, 6, 12, 18, 24)}
    by_candidates = {k: bench.trial(40, 8, 12, k) for k in (1, 2, 4, 8, 16)}
    result = {
        "command": "python benchmarks/engine.py",
        "date": date.today().isoformat(),
        "seed": SEED,
        "machine": machine_facts(arguments.threads),
        "versions": library_versions(),
        "model": "demo model, 135M, float32, 30 layers",
        "breakdown": [bench.breakdown(80, 8, layer) for layer in (0, 12)],
        "seconds_by_positions_40_prompts_all_layers": by_positions,
        "seconds_per_position_slope": slope(by_positions),
        "n32_over_n1": by_positions[32] / by_positions[1],
        "seconds_by_prompts_8_positions_from_layer_12": by_prompts,
        "seconds_per_prompt_slope": slope(by_prompts),
        "seconds_by_first_edited_layer_80_prompts_8_positions": by_layer,
        "seconds_per_layer_slope": slope(by_layer),
        "seconds_a_candidate_by_candidates_at_once_40_prompts_from_layer_12": by_candidates,
        "racing": bench.raced(40, 8),
        "drafts": bench.drafted(40, 40),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
