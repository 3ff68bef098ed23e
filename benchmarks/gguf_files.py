"""GGUF files of one model in llama.cpp: KL by size, the floor across back ends, time, memory.

    python benchmarks/gguf_files.py --model PATH [--threads 1] [--prompts 16] [--split smollm]
    python benchmarks/gguf_files.py --draw    # docs/figures/gguf_size.png anew, from the results

Writes the model (of the llama type) as a float16 GGUF file, makes the other types of it with
llama.cpp's quantizer, and measures all of them from the model's own safetensors over its responses,
in float32. Then the time of `TeacherForcedKL.score` of a file, without the floor across back ends,
against llama.cpp's bare pass over the same tokens, each with the file opened anew.

Memory: text mode over one window of 32,768 tokens of a small random model with V = 49,152, half of
them scored, each case in a process of its own: peak resident memory of the candidate's forward pass
alone against that of a whole measurement.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from machine import run_facts

TYPES = {
    "F16": 1,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q5_K_M": 17,
    "Q5_0": 8,
    "Q4_K_M": 15,
    "Q4_0": 2,
    "Q3_K_M": 12,
    "Q2_K": 10,
}
"""Names and llama.cpp's numbers of them."""
POSITIONS = 8
PICTURE = Path(__file__).parents[1] / "docs" / "figures" / "gguf_size.png"
LONG = 32_768


def made(model: Path, folder: Path, split: str) -> list[Path]:
    """All files, the float16 one first."""
    from heretic_kl.score.llama.model import _library
    from heretic_kl.testing.gguf_file import write_llama_gguf

    library = _library()  # keeps llama.cpp's log from stderr
    whole = write_llama_gguf(model, folder / "F16.gguf", dtype="F16", split=split)
    files = [whole]
    for name, number in list(TYPES.items())[1:]:
        options = library.llama_model_quantize_default_params()
        options.nthread, options.ftype = torch.get_num_threads(), number
        files.append(folder / f"{name}.gguf")
        code = library.llama_model_quantize(
            str(whole).encode(), str(files[-1]).encode(), ctypes.byref(options)
        )
        if code != 0:
            raise SystemExit(f"llama.cpp could not make {name}")
    return files


def measured(model: Path, files: list[Path], prompts: int) -> dict[str, object]:
    """Every file against the model's safetensors."""
    from heretic_kl.prompts import DatasetSpec
    from heretic_kl.score import TeacherForcedKL, rank

    kl = TeacherForcedKL(
        model,
        prompts=DatasetSpec("builtin:harmless", split="test", limit=prompts),
        kl_tokens=POSITIONS,
        dtype="float32",
        backend="llama.cpp",
        device="cpu",
    )
    measurements = []
    for file in files:
        measurements.append(kl.score(file))
        print(file.stem, measurements[-1], measurements[-1].back_end_floor, flush=True)
    assert kl.noise_floor is not None
    ranked = rank([str(file) for file in files], measurements)
    return {
        "prompts": kl.prompts,
        "positions": kl.reference.rows,
        "noise_floor": kl.noise_floor.batching,
        "bfloat16_floor": kl.noise_floor.rounding,
        "files": [
            {
                "type": Path(line.name).stem,
                "group": line.group,
                "megabytes": round(line.size.file_bytes / 1e6, 1),
                "bits_per_weight": round(line.size.bits_per_weight, 2),
                "kl": line.measurement.kl,
                "standard_error": line.measurement.summary.standard_error,
                "same_best_token": line.measurement.summary.top1_agreement,
                "back_end_floor": line.measurement.back_end_floor,
            }
            for line in ranked
        ],
        "time": [timed(kl, file) for file in files[:2]],
    }


def timed(kl, file: Path, repeats: int = 3) -> dict[str, object]:
    """Milliseconds a scored position: llama.cpp's pass alone, and the whole score; in turns."""
    from heretic_kl.model import ModelSource
    from heretic_kl.score.llama.candidate import open_model

    run, kl = kl._run, copy(kl)
    kl.noise_floor = None  # so that the file is not run in transformers, too

    def bare() -> None:
        model = open_model(run, ModelSource(str(file)))
        for sequence in run.sequences:
            for _logits in model.blocks(sequence):
                pass
        model.close()

    seconds: dict[str, list[float]] = {"bare": [], "measured": []}
    for _ in range(repeats):
        for name, work in (
            ("bare", bare),
            ("measured", lambda: kl.score(file)),
        ):
            started = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - started)
    per_row = {
        f"{name}_ms": round(1e3 * statistics.median(times) / run.reference.rows, 2)
        for name, times in seconds.items()
    }
    ratio = statistics.median(seconds["measured"]) / statistics.median(seconds["bare"])
    return {"type": file.stem, **per_row, "ratio": round(ratio, 2)}


def long_text_case(measure: bool) -> None:
    """Run in a process of its own; prints the peak of its resident memory in MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from heretic_kl.score import Document, TextKL
    from heretic_kl.testing import WORDS, tiny_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LONG,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    tokenizer = tiny_tokenizer()
    text = " ".join((WORDS * (1 + LONG // len(WORDS)))[:LONG])
    if measure:
        kl = TextKL(
            model,
            [Document(text, "long")],
            tokenizer,
            context=LONG,
            stride=LONG // 2,
            noise_floor=False,
        )
        with torch.no_grad():
            model.lm_head.weight += 0.01
        kl.score(model)
    else:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def memory() -> dict[str, object]:
    """Peaks of both cases, and what the logits of one model would take."""
    peaks = {}
    for name in ("forward", "measured"):
        done = subprocess.run(
            [sys.executable, __file__, "--case", name], capture_output=True, text=True, check=True
        )
        peaks[f"{name}_megabytes"] = round(float(done.stdout.split()[-1]))
    more = peaks["measured_megabytes"] - peaks["forward_megabytes"]
    logits = LONG // 2 * 49_152 * 4 / 2**20
    return {**peaks, "more_megabytes": more, "logits_would_take_megabytes": round(logits)}


def draw(files: Sequence[Mapping[str, Any]]) -> None:
    """KL against size of the quantized files, nearest first as the results have them."""
    from heretic_kl.report import png, size_figure

    rows: list[dict[str, Any]] = []
    for file in (file for file in files if file["type"] != "F16"):  # which would crowd the others
        name, size, kl = file["type"], file["megabytes"], file["kl"]
        within = 1.96 * file["standard_error"]
        rows.append(
            {
                **{"name": name, "size": size, "bits": file["bits_per_weight"]},
                **{"kl": kl, "low": kl - within, "high": kl + within},
                "pareto": all(size < row["size"] for row in rows),
                "text": f"{name}: {kl:.2g} nats",
            }
        )
    PICTURE.write_bytes(png(size_figure(rows, {}).drawing))
    print(f"drew {PICTURE}")


def main() -> None:
    """Measure everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--split", default="smollm", help="tokenizer.ggml.pre of the model")
    parser.add_argument("--case", choices=("forward", "measured"), help=argparse.SUPPRESS)
    parser.add_argument("--draw", action="store_true", help="the picture alone")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gguf.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.case:
        long_text_case(arguments.case == "measured")
        return
    if arguments.draw:
        draw(json.loads(arguments.output.read_text(encoding="utf-8"))["files"])
        return
    with tempfile.TemporaryDirectory() as folder:
        files = made(arguments.model, Path(folder), arguments.split)
        results = measured(arguments.model, files, arguments.prompts)
    facts = run_facts(0, arguments.threads, "float32", "llama-cpp-python", "gguf")
    document: dict[str, Any] = {
        **facts,
        "model": arguments.model.name,
        **results,
        "long_text": memory(),
    }
    arguments.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")
    draw(document["files"])


if __name__ == "__main__":
    main()
