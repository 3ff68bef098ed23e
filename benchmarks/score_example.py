"""The example of docs/measuring.md: candidates of the demo model, read against its own rounding.

    python benchmarks/score_example.py [--threads 1] [--prompts 8]

Writes GGUF files of the demo model (Q8_0, Q5_0 and Q4_0 by the gguf package, every matrix in that
type), and measures them and the model that the demo model was made from, all in `transformers` and
float32. Results: benchmarks/results/score_example.json, docs/figures/score_size.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from machine import run_facts

from heretic_kl.demo.build import ensure_base_model, ensure_demo_model
from heretic_kl.prompts import DatasetSpec
from heretic_kl.score import TeacherForcedKL
from heretic_kl.testing.gguf_file import write_llama_gguf

ROOT = Path(__file__).parents[1]
TYPES = ("Q8_0", "Q5_0", "Q4_0")
POSITIONS = 8


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    demo = ensure_demo_model()
    kl = TeacherForcedKL(
        demo,
        prompts=DatasetSpec("builtin:harmless", "test", limit=arguments.prompts),
        refusal_prompts=DatasetSpec("builtin:harmful", "train", limit=16),
        kl_tokens=POSITIONS,
        dtype="float32",
        device="cpu",
        backend="transformers",
        bands=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {
            f"{n}.gguf": write_llama_gguf(demo, Path(folder) / f"{n}.gguf", dtype=n) for n in TYPES
        }
        comparison = kl.compare([*map(str, files.values()), str(ensure_base_model())])
    comparison.plot(ROOT / "docs" / "figures" / "score_size.png")
    assert kl.noise_floor is not None
    candidates = []
    for record, candidate in zip(comparison.records(), comparison.ranked, strict=True):
        split = candidate.measurement.split
        name = Path(record["candidate"]).name
        del record["verdict"]  # words for the figures beside it
        candidates.append(
            {**record, "candidate": name, "split": None if split is None else split.to_dict()}
        )
    document = {
        **run_facts(0, arguments.threads, "float32", "gguf", "transformers"),
        "seconds": round(time.monotonic() - started),
        "prompts": kl.prompts,
        "positions": kl.reference.rows,
        "noise_floor": kl.noise_floor.batching,
        "bands": [band._asdict() for band in kl.bands],
        "candidates": candidates,
    }
    target = ROOT / "benchmarks" / "results" / "score_example.json"
    target.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(comparison.to_markdown())


if __name__ == "__main__":
    main()
