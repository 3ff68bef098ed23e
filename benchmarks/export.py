"""Memory that saving a merged model takes beyond the loaded model, against its largest shard.

    python benchmarks/export.py [--threads 2] [--repeats 3]

The demo model, every site edited, written from its own files in two cases: as one file, and stored
in shards of 60 MB. Each case in a process of its own: resident memory with the model loaded and the
edit made, then the peak while it is saved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from machine import library_versions, machine_facts
from measurement import forget_peak_memory, peak_resident_mb

CASES = {"one file": "50GB", "shards of 60 MB": "60MB"}
SEED = 0


def save_and_measure(source: str, target: Path) -> None:
    """Run in a process of its own; prints the extra peak in MB."""
    from heretic_kl.ablation import ablation_operator
    from heretic_kl.export import save_merged
    from heretic_kl.model import ModelSource, load_model

    lm = load_model(ModelSource(source), device="cpu")
    generator = torch.Generator().manual_seed(SEED)
    direction = torch.randn(lm.architecture.width, generator=generator)
    plan = {
        key: ablation_operator(facts.pull_back(direction), 1.0)
        for key, facts in lm.architecture.facts().items()
    }
    forget_peak_memory()
    before = peak_resident_mb()
    saved = save_merged(lm, plan, target)
    assert saved.route == "streamed"
    print(peak_resident_mb() - before)


def case(source: Path, threads: int, repeats: int) -> dict[str, object]:
    """One way of storing the original."""
    shards = [path.stat().st_size / 2**20 for path in source.glob("*.safetensors")]
    extra = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, __file__, "--threads", str(threads)]
            words += ["--case", str(source), "--target", str(Path(folder) / "out")]
            run = subprocess.run(words, check=True, capture_output=True, text=True)
            extra.append(float(run.stdout.splitlines()[-1]))
    return {
        "shards": len(shards),
        "largest_shard_mb": max(shards),
        "extra_peak_mb": extra,
        "median_over_largest_shard": statistics.median(extra) / max(shards),
    }


def main() -> None:
    """Measure all cases, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    default = Path(__file__).parent / "results/export.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        return save_and_measure(arguments.case, arguments.target)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from heretic_kl.demo import ensure_demo_model

    demo = ensure_demo_model()
    cases = {}
    for name, size in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            model = AutoModelForCausalLM.from_pretrained(demo, dtype=torch.bfloat16)
            model.save_pretrained(folder, max_shard_size=size)
            AutoTokenizer.from_pretrained(demo).save_pretrained(folder)
            del model
            cases[name] = case(Path(folder), arguments.threads, arguments.repeats)
    result = {
        "command": "python benchmarks/export.py",
        "date": date.today().isoformat(),
        "seed": SEED,
        "machine": machine_facts(arguments.threads),
        "versions": library_versions(),
        "cases": cases,
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
