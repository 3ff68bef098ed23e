"""Trials per minute on a GPU, on random weights of real models' shapes.

    python benchmarks/gpu.py [--shapes 0.5B,4B,8B] [--prompts 100] [--tokens 100] [--repeats 3]

For each shape and K candidates at once: a teacher-forced objective (8 positions) and generation
without a rule that ends responses early (every candidate another edit), with all layers edited
and from the middle one on; medians, and how busy the device was by `nvidia-smi` (where `pynvml`
is installed). bf16.

A step of refinement and a check of it are timed too, and from all of these the minutes of a run are
estimated: `TRIALS` trials, then `REFINEMENTS` learned edits, without loading the model. The
command runs on a CPU with `--device cpu` to be tried there; shapes that fit are few.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from machine import library_versions, machine_facts

SHAPES = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "4B": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
TRIALS, REFINEMENTS, STRENGTHS = 40, 3, 3
"""Of the run whose minutes are estimated: trials, learned edits, measurements of each."""
CANDIDATES, POSITIONS, VOCABULARY, SEED = (1, 4, 8), 8, 151_936, 1


def model(shape: dict, device: str, vocabulary: int):
    """Random weights in bfloat16, with the tests' small tokenizer."""
    from transformers import Qwen3Config

    from heretic_kl.model import ModelSource, load_model
    from heretic_kl.testing import save_tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = Qwen3Config(
        vocab_size=vocabulary,
        **{"tie_word_embeddings": True, **shape},
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_model(Path(folder), config, dtype=torch.bfloat16, seed=SEED)
        return load_model(ModelSource(folder), dtype="bfloat16", device=device)


def prompts(count: int) -> tuple:
    """Prompts of 12 to 42 words behind a common system prompt."""
    from heretic_kl.prompts import Prompt
    from heretic_kl.testing import WORDS

    system = " ".join(WORDS[:20])
    return tuple(
        Prompt(" ".join(WORDS[(i + j) % len(WORDS)] for j in range(12 + i % 31)), system)
        for i in range(count)
    )


def busy_share() -> Callable[[], float | None]:
    """Starts to watch the device; the returned function gives the share of samples it was busy."""
    try:
        torch.cuda.utilization()
    except (ImportError, ModuleNotFoundError, RuntimeError):
        return lambda: None
    import threading

    samples: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            samples.append(torch.cuda.utilization())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()

    def stop() -> float | None:
        over.set()
        thread.join()
        return statistics.mean(samples) / 100 if samples else None

    return stop


def timed(work: Callable[[int], object], repeats: int, candidates: int) -> dict:
    """Median seconds a candidate after one run that does not count; `work` is told which run."""
    work(0)
    seconds = []
    stop = busy_share()
    for index in range(repeats):
        start = time.perf_counter()
        work(1 + index)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / candidates)
    median = statistics.median(seconds)
    return {"seconds": median, "trials_per_minute": 60 / median, "busy": stop()}


def measure(lm, count: int, tokens: int, repeats: int) -> dict:
    """Both objectives for each K and each lowest edited layer."""
    from heretic_kl.ablation import ablation_operator
    from heretic_kl.engine import Engine
    from heretic_kl.kl import DivergenceReduction
    from heretic_kl.requests import ResponseRequest, TeacherForcedRequest

    asked = prompts(count)
    forced = TeacherForcedRequest(asked, POSITIONS, DivergenceReduction())
    spoken = ResponseRequest(asked, tokens)
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(SEED))
    sites, layers = lm.architecture.facts(), len(lm.architecture.layers)

    def plan(lowest: int, number: int) -> dict:
        operator = ablation_operator(direction, 0.3 + 0.01 * number)
        return {key: operator for key in sites if key.layer >= lowest}

    found: dict[str, object] = {}
    for lowest in (0, layers // 2):
        for candidates in CANDIDATES:
            engine = Engine(lm, batch_size=count, cache_bytes=4 * 2**30)
            engine.measure(None, [spoken])

            def run(index: int, request) -> object:
                first = index * candidates  # noqa: B023 (called before the loop goes on)
                plans = [plan(lowest, first + i) for i in range(candidates)]  # noqa: B023
                return engine.measure_many(plans, [request])  # noqa: B023

            found[f"from layer {lowest}, {candidates} at once"] = {
                "teacher_forced": timed(lambda i: run(i, forced), repeats, candidates),  # noqa: B023
                "generation": timed(lambda i: run(i, spoken), repeats, candidates),  # noqa: B023
            }
    return found


def learning(lm, count: int, repeats: int) -> dict:
    """Seconds of a step of refinement, of a check without its responses, and peak memory."""
    from heretic_kl.ablation import ablation_operator
    from heretic_kl.engine import Engine, forced_sequences
    from heretic_kl.refine import RefineOptions
    from heretic_kl.refine.objective import Example, Objective
    from heretic_kl.refine.openings import OpeningSet
    from heretic_kl.refine.training import Prompts, _Learner

    engine, options = Engine(lm, batch_size=count), RefineOptions()
    asked = prompts(count)
    reference = engine.reference(asked, 2 * POSITIONS)
    examples, first = [], 0
    for sequence in forced_sequences(reference):
        rows = len(sequence.scored)
        examples.append(Example(sequence, reference.hidden[first : first + rows]))
        first += rows
    uses = Prompts(examples, [engine.encode(prompt) for prompt in asked])
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(SEED))
    start = dict.fromkeys(lm.architecture.facts(), ablation_operator(direction, 0.3))
    objective = Objective(engine.runner, lm.head, OpeningSet(((5,),)))
    learner = _Learner(start, lm.architecture, objective, uses, options)
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = timed(lambda index: learner.step(), repeats, 1)
    check = timed(lambda index: learner.evaluate(learner.averaged(), uses), repeats, 1)
    peak = torch.cuda.max_memory_allocated() / 2**30 if lm.device.type == "cuda" else None
    return {"step": step["seconds"], "check": check["seconds"], "peak_gib": peak}


def estimated_minutes(measured: dict, learned: dict) -> dict:
    """Minutes of a search and of refinement after it, from the seconds of their parts."""
    from heretic_kl.refine import RefineOptions

    whole = measured["from layer 0, 1 at once"]
    trial = whole["teacher_forced"]["seconds"] + whole["generation"]["seconds"]
    options = RefineOptions()
    checks = 1 + options.steps // options.check_every
    # A check's responses are a sixth of a trial's: 16 tokens of 100.
    check = learned["check"] + whole["generation"]["seconds"] / 6
    refinement = options.steps * learned["step"] + checks * check + STRENGTHS * trial
    return {"search": TRIALS * trial / 60, "refinement": REFINEMENTS * refinement / 60}


def main() -> None:
    """Measure, print, write; a line where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="some of them, by name")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/gpu.json")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: this benchmark needs one")
    gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    result = {
        "command": "python benchmarks/gpu.py",
        "date": date.today().isoformat(),
        "seed": SEED,
        "machine": {**machine_facts(torch.get_num_threads()), "gpu": gpu},
        "versions": library_versions(),
        "prompts": arguments.prompts,
        "tokens": arguments.tokens,
        "shapes": {},
    }
    for name in arguments.shapes.split(","):
        lm = model(SHAPES[name], arguments.device, VOCABULARY)
        found = measure(lm, arguments.prompts, arguments.tokens, arguments.repeats)
        learned = learning(lm, arguments.prompts, arguments.repeats)
        minutes = estimated_minutes(found, learned)
        result["shapes"][name] = {**found, "learning": learned, "minutes": minutes}
        del lm
        torch.cuda.empty_cache()
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
