"""The engine beside that of another revision: the same work, alternating, as ratios of medians.

    python benchmarks/engine_against.py REVISION [--dtype float32] [--threads 1] [--rounds 3]

Every round is a process of its own for each side. On the demo model, built-in prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import DTYPES, resolved_dtype, run_facts

HERE = Path(__file__).resolve().parent
SEED, PROMPTS, POSITIONS, RESPONSES, TOKENS, REPEATS = 1, 80, 8, 40, 40, 3

MEASURE = f"""
import inspect, json, sys, torch
sys.path.insert(0, "benchmarks")
torch.set_num_threads(int(sys.argv[2]))
from engine import Bench
from trial_parts import median_seconds
from heretic_kl.engine import Engine
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseRequest
bench = Bench({REPEATS}, sys.argv[1])
bench.prompts = tuple(map(Prompt, json.load(sys.stdin)))
# Older engines drafted responses from those of the plan before, here the same one.
drafts = "draft_answers" in inspect.signature(Engine).parameters
undrafted = {{"draft_answers": False}} if drafts else {{}}
engine = Engine(bench.lm, batch_size={RESPONSES}, **undrafted)
request, plan = ResponseRequest(bench.prompts[:{RESPONSES}], {TOKENS}), bench.plan(0)
(responses,) = engine.measure(plan, [request])
print(json.dumps({{
    "response_characters": sum(map(len, responses.texts)),
    "teacher_forced_from_layer_0": bench.trial({PROMPTS}, {POSITIONS}, 0),
    "teacher_forced_from_layer_12": bench.trial({PROMPTS}, {POSITIONS}, 12),
    "responses": median_seconds(lambda: engine.measure(plan, [request]), {REPEATS}),
}}))
"""


def the_prompts() -> list[str]:
    """The same ones for both sides: built-in sets may differ."""
    from heretic_kl.prompts import DatasetSpec, load_prompts

    specs = [DatasetSpec(f"builtin:{kind}", "validation") for kind in ("harmless", "harmful")]
    texts = [prompt.user for spec in specs for prompt in load_prompts(spec)[: PROMPTS // 2]]
    assert len(texts) == PROMPTS
    return texts


def measured(checkout: Path, dtype: str, threads: int) -> dict[str, float]:
    """Seconds of each work with the code of a checkout, and how long the responses were."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype, str(threads)],
        cwd=checkout,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        input=json.dumps(the_prompts()),
    )
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def commit(revision: str) -> str:
    """Its hash."""
    words = ["git", "rev-parse", "--short=12", f"{revision}^{{commit}}"]
    return subprocess.run(
        words, cwd=HERE, check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Measure both in turn, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results/engine_against.json")
    words = parser.parse_args()
    dtype = resolved_dtype(words.dtype)
    rounds: dict[str, list[dict[str, float]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        git = ["git", "-C", str(HERE), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", before, words.revision], check=True)
        try:
            for _ in range(words.rounds):
                for name, checkout in (("before", before), ("now", HERE.parent)):
                    rounds[name].append(measured(checkout, dtype, words.threads))
                    print(name, rounds[name][-1], flush=True)
        finally:
            subprocess.run([*git, "remove", "--force", before], check=True)
    works = [work for work in rounds["now"][0] if work != "response_characters"]
    medians = {
        name: {work: statistics.median(r[work] for r in made) for work in works}
        for name, made in rounds.items()
    }
    result = run_facts(SEED, words.threads, dtype)
    result |= {"before": commit(words.revision), "now": commit("HEAD"), "rounds": rounds}
    result["work"] = {
        "teacher_forced": f"{PROMPTS} prompts, {POSITIONS} positions",
        "responses": f"{RESPONSES} prompts, up to {TOKENS} tokens, edit from layer 0",
    }
    result["median_seconds"] = medians
    result["now_over_before"] = {w: medians["now"][w] / medians["before"][w] for w in works}
    words.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["now_over_before"], indent=2))


if __name__ == "__main__":
    main()
