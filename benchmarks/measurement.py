"""What a teacher-forced KL costs beyond the forward pass: memory at a large vocabulary, and time.

    python benchmarks/measurement.py [--threads 2] [--repeats 5]

Memory: a random model with V = 262,144, P = 100 prompts, N = 32 positions, each case in a process
of its own: peak resident memory of a process that only runs the candidate's forward pass over the
forced responses against one that measures the KL as well.

Time: the demo model, P = 64, N = 32. A bare forward pass (hidden states, then logits at the scored
positions, nothing kept) of the candidate's plain weights against `TeacherForcedKL.score` of the
loaded candidate as the command runs it: weights packed anew, trees of tokens, the reference's
logits from its stored hidden states, every statistic and what the tables show. In turns, over the
same tokens in the same trees. Also against a bare pass of the packed weights, and the pass that any
script would run: one padded batch after another, without sharing what prompts begin with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from machine import library_versions, machine_facts

VOCABULARY, PROMPTS, POSITIONS = 262_144, 100, 32
PROMPT_TOKENS, WIDTH, LAYERS = 24, 640, 4
BATCH = 16
SEED = 0


def large_vocabulary_case(measure: bool) -> None:
    """Run in a process of its own; prints the peak of its resident memory in MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from heretic_kl.engine import MemoryLimits, Runner, forced_sequences
    from heretic_kl.kl import Reference, ReferenceIdentity, summarize
    from heretic_kl.model import CausalModel
    from heretic_kl.model.loading.head import find_body_and_head

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    lm = CausalModel(model, None, frozenset(), *find_body_and_head(model), torch.float32)  # no text
    ids = torch.randint(VOCABULARY, (PROMPTS, PROMPT_TOKENS + POSITIONS))
    mask = torch.ones(PROMPTS, POSITIONS, dtype=torch.bool)
    empty = torch.zeros(PROMPTS * POSITIONS, WIDTH)
    identity = ReferenceIdentity("none", VOCABULARY)
    prompts, responses = ids[:, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
    reference = Reference.from_hidden(responses, mask, empty, identity, prompts)
    runner = Runner(lm.limited(prefix_problem="off"), MemoryLimits(BATCH), trees=False)
    forget_peak_memory()  # of building the model
    hidden = runner.hidden_states(forced_sequences(reference))
    if measure:
        reference = reference.with_hidden(hidden + 0.01 * torch.randn_like(hidden))
        assert summarize(reference.measure(hidden, head=lm.head)).mean > 0.0
    print(peak_resident_mb())


def forget_peak_memory() -> None:
    """Start the kernel's record of peak resident memory anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_mb() -> float:
    """Peak resident memory since then, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status: this benchmark needs Linux")


def peak_memory(case: str, threads: int) -> float:
    """Peak MB of one case in a fresh process."""
    words = [sys.executable, __file__, "--case", case, "--threads", str(threads)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def timing(repeats: int) -> dict[str, object]:
    """Medians of bare forward passes and of whole measurements, taken in turns."""
    from heretic_kl.demo import ensure_demo_model
    from heretic_kl.engine import MemoryLimits, Runner, forced_sequences
    from heretic_kl.kl.head import MAX_LOGIT_ELEMENTS
    from heretic_kl.kl.terms import row_blocks
    from heretic_kl.model import ModelSource, load_model, with_packed_weights
    from heretic_kl.score import TeacherForcedKL

    folder = ensure_demo_model(notify=lambda message: None)
    lm = load_model(ModelSource(str(folder)), dtype="float32")
    kl = TeacherForcedKL(
        folder, kl_tokens=POSITIONS, batch_size=BATCH, noise_floor=False, dtype="float32"
    )
    packed = with_packed_weights(load_model(ModelSource(str(folder)), dtype="float32"))
    reference, sequences = kl.reference, forced_sequences(kl.reference)

    def forward(model, trees: bool) -> None:
        hidden = Runner(model, MemoryLimits(BATCH), trees=trees).hidden_states(sequences)
        for block in row_blocks(hidden.shape[0], model.head.vocabulary, MAX_LOGIT_ELEMENTS):
            model.head.logits(hidden[block])

    works = {
        "bare_forward": lambda: forward(lm, True),
        "bare_forward_of_packed_weights": lambda: forward(packed, True),
        "bare_forward_in_padded_batches": lambda: forward(
            lm.limited(prefix_problem="as a script does it"), False
        ),
        "measurement": lambda: kl.score(lm),
    }
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(seconds(work))
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {
        "model": "demo model, 135M, float32",
        "prompts": kl.prompts,
        "positions": POSITIONS,
        "scored_rows": reference.rows,
        "fed_tokens": sum(len(s.fed) for s in sequences),
        "repeats": repeats,
        "median_seconds": medians,
        "measurement_over_bare_forward": medians["measurement"] / medians["bare_forward"],
        "packed_weights": kl._run.packs,
    }


def main() -> None:
    """Measure both, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", choices=("forward", "measure"), help=argparse.SUPPRESS)
    default = Path(__file__).parent / "results/measurement.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        return large_vocabulary_case(arguments.case == "measure")
    peaks = {
        case: [peak_memory(case, arguments.threads) for _ in range(arguments.repeats)]
        for case in ("forward", "measure")
    }
    result = {
        "command": "python benchmarks/measurement.py",
        "date": date.today().isoformat(),
        "seed": SEED,
        "machine": machine_facts(arguments.threads),
        "versions": library_versions(),
        "memory": {
            "vocabulary": VOCABULARY,
            "prompts": PROMPTS,
            "positions": POSITIONS,
            "width": WIDTH,
            "layers": LAYERS,
            "peak_mb": peaks,
            "median_extra_mb": statistics.median(peaks["measure"])
            - statistics.median(peaks["forward"]),
            "largest_extra_mb": max(peaks["measure"]) - min(peaks["forward"]),
            "all_logits_would_be_mb": PROMPTS * POSITIONS * VOCABULARY * 4 / 2**20,
        },
        "time": timing(arguments.repeats),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
