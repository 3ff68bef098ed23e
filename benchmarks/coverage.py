"""Every decoder type of the installed transformers, taken from loading to a saved edit.

    python benchmarks/coverage.py [TYPES...] [--seed 0]

Runs tiny random models in float32 on a CPU. Without TYPES it writes `results/coverage.json` and
`docs/coverage.md`; named types are only printed. Exit code 1: a type failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch
from coverage_table import markdown, summary, summary_line, text_row
from machine import library_versions, machine_facts
from type_coverage import cover, decoder_types

RESULTS = Path(__file__).parent / "results/coverage.json"
PAGE = Path(__file__).parent.parent / "docs/coverage.md"


def main() -> int:
    """Cover, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    unknown = sorted(set(arguments.types) - set(decoder_types()))
    if unknown:
        parser.error(f"no decoder types: {', '.join(unknown)}")
    types = {}
    for model_type in arguments.types or decoder_types():
        with tempfile.TemporaryDirectory() as folder:
            types[model_type] = cover(model_type, Path(folder), seed=arguments.seed).as_dict()
        print(text_row(types[model_type]), flush=True)
    print(summary_line(types))
    if not arguments.types:
        results = {
            "command": "python benchmarks/coverage.py",
            "date": date.today().isoformat(),
            "seed": arguments.seed,
            "machine": machine_facts(arguments.threads),
            "versions": library_versions(),
            "summary": summary(types),
            "types": types,
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(markdown(results), encoding="utf-8")
    return 1 if summary(types)["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
