"""The example of docs/measuring.md: candidates of the demo model, read against its own rounding.

    python benchmarks/score_example.py [--threads 1] [--prompts 16]

Makes what people publish of a model, from the demo model: GGUF files (by the gguf package, every
matrix in one type), bitsandbytes, weights rounded to 4 bits, an edit (the first trial of a search),
and the edit as a GGUF file. Measures them and the model that the demo model was made from, all in
`transformers` and float32. Results: benchmarks/results/score_example.json,
docs/figures/score_size.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import run_facts
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from heretic_kl import Session, Settings
from heretic_kl.demo.build import ensure_base_model, ensure_demo_model
from heretic_kl.model.rounding import rounded_weights
from heretic_kl.prompts import DatasetSpec, load_prompts
from heretic_kl.score import (
    ChainMeasurement,
    MeasuredOn,
    RankedCandidate,
    TeacherForcedKL,
    card_metadata,
    measure_chain,
)
from heretic_kl.testing.gguf_file import write_llama_gguf

ROOT = Path(__file__).parents[1]
TYPES = ("Q8_0", "Q5_0", "Q4_0")
STEPS = ("edit", "edit-Q4_0.gguf")
"""After the demo model, each made from the one before."""
POSITIONS = 8


def quantized_files(model: Path, folder: Path, stem: str, types: Sequence[str]) -> list[Path]:
    """A GGUF file of each type."""
    return [write_llama_gguf(model, folder / f"{stem}{name}.gguf", dtype=name) for name in types]


def rounded(model: Path, folder: Path) -> Path:
    """Linear weights rounded to 4 bits, stored as before."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with rounded_weights(loaded, 4):
        loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def packed(model: Path, folder: Path, **options: Any) -> Path:
    """Linear weights packed by bitsandbytes."""
    config = BitsAndBytesConfig(**options)
    AutoModelForCausalLM.from_pretrained(
        model, quantization_config=config, dtype=torch.float32
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def edited(model: Path, folder: Path) -> Path:
    """The first trial of a search: the same for everybody, and no more than a start."""
    settings = Settings(
        model=str(model),
        prompt_set="builtin",
        study_dir=folder.parent / "studies",
        device="cpu",
        trials=1,
        test_trials=0,
        refine=False,
    )
    with Session(settings) as session:
        session.search()
        session.save(session.trials[0], folder, "merged")
    return folder


def candidates_in(folder: Path, demo: Path) -> list[Path]:
    """All of them, the unedited base last."""
    edit = edited(demo, folder / "edit")
    return [
        *quantized_files(demo, folder, "", TYPES),
        rounded(demo, folder / "rounded-4-bit"),
        packed(demo, folder / "bnb-int8", load_in_8bit=True),
        packed(demo, folder / "bnb-nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        edit,
        *quantized_files(edit, folder, "edit-", ["Q4_0"]),
        ensure_base_model(),
    ]


def lines_of(ranked: Sequence[RankedCandidate]) -> list[str]:
    """The table of docs/measuring.md."""
    head = ["group", "candidate", "MB", "KL, nats", "lies, in rounding of this model"]
    head += ["gain, loss", "refusing or not", "the rest"]
    lines = [head, ["---"] * len(head)]
    for candidate in ranked:
        measured = candidate.measurement
        place = re.search(r"(about|between|less than|more than) .*-bit", measured.verdict)
        change, split = measured.change, measured.split
        assert split is not None and change is not None and candidate.size is not None
        lines.append(
            [
                candidate.group,
                Path(candidate.name).name,
                f"{candidate.size.file_bytes / 1e6:.1f}",
                with_error(measured.summary),
                "below the floor" if place is None else place[0],
                f"{change.gain.mean:.2g}, {change.loss.mean:.2g}",
                with_error(split.behaviour),
                with_error(split.remainder),
            ]
        )
    return [f"| {' | '.join(cells)} |" for cells in lines]


def with_error(estimate: Any) -> str:
    """A mean and its standard error."""
    return f"{estimate.mean:.3g} ± {estimate.standard_error:.2g}"


def chain_lines(chain: ChainMeasurement, names: Sequence[str]) -> list[str]:
    """What each step cost, and what the whole costs beyond their sum: a table."""
    beyond = chain.beyond_the_steps()
    cells = [
        (names[pair.earlier], names[pair.later], with_error(pair.measurement.summary))
        for pair in chain.pairs
    ]
    error = "" if beyond.standard_error is None else f" ± {beyond.standard_error:.2g}"
    cells.append(("whole minus steps", "", f"{beyond.mean_difference:+.3g}{error}"))
    head = [("from", "to", "KL, nats"), ("---",) * 3]
    return [f"| {' | '.join(row)} |" for row in [*head, *cells]]


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    started = time.monotonic()
    demo = ensure_demo_model()
    prompts = load_prompts(DatasetSpec("builtin:harmless", "test", limit=arguments.prompts))
    kl = TeacherForcedKL(
        demo,
        prompts=prompts,
        refusal_prompts=DatasetSpec("builtin:harmful", "train", limit=16),
        kl_tokens=POSITIONS,
        dtype="float32",
        device="cpu",
        backend="transformers",
        bands=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        made = candidates_in(Path(folder), demo)
        comparison = kl.compare([*map(str, made)])
        by_name = {Path(line.name).name: line.measurement for line in comparison.ranked}
        steps = [path for path in made if path.name in STEPS]
        chain = measure_chain(kl, [*map(str, steps)], [by_name[path.name] for path in steps])
    comparison.plot(ROOT / "docs" / "figures" / "score_size.png")
    assert kl.noise_floor is not None
    text = "\n".join(prompt.user for prompt in prompts)
    on = MeasuredOn(
        reference="demo-model",
        source="builtin:harmless",
        count=kl.prompts,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        positions=POSITIONS,
        split="test",
    )
    lines = lines_of(comparison.ranked)
    document = {
        **run_facts(0, arguments.threads, "float32", "gguf", "transformers", "bitsandbytes"),
        "seconds": round(time.monotonic() - started),
        "prompts": kl.prompts,
        "positions": kl.reference.rows,
        "noise_floor": kl.noise_floor.batching,
        "bands": [band._asdict() for band in kl.bands],
        "candidates": [
            plain(*pair) for pair in zip(comparison.records(), comparison.ranked, strict=True)
        ],
        "table": lines,
        "chain": chain_lines(chain, ["demo-model", *STEPS]),
        "card": card_metadata("demo-model-Q8_0", by_name["Q8_0.gguf"], on),
    }
    target = ROOT / "benchmarks" / "results" / "score_example.json"
    target.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print("\n".join(lines))


def plain(record: dict[str, Any], candidate: RankedCandidate) -> dict[str, Any]:
    """A candidate's figures without its folder, and without words for them."""
    del record["verdict"]
    split = candidate.measurement.split
    return {
        **record,
        "candidate": Path(record["candidate"]).name,
        "split": None if split is None else split.to_dict(),
    }


if __name__ == "__main__":
    main()
