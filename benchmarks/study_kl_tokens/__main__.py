"""Does the KL over several positions see damage that the first one misses? Measures it.

    python -m benchmarks.study_kl_tokens                       # the demo model, about 120 edits
    python -m benchmarks.study_kl_tokens --model base --every 3
    python -m benchmarks.study_kl_tokens --model FOLDER --name NAME --size half --every 5
    python -m benchmarks.study_kl_tokens --quick               # 5 minutes, into another file

The plan is docs/decisions/026-study-of-kl-tokens.md. A killed run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import DTYPES, command_line, resolved_dtype, run_facts
from benchmarks.study_kl_tokens.builder import Builder
from benchmarks.study_kl_tokens.divergences import table
from benchmarks.study_kl_tokens.edits import NOTHING, SEED, Edit, all_edits
from benchmarks.study_kl_tokens.measure import Bench
from benchmarks.study_kl_tokens.reference import ReferenceSide
from benchmarks.study_kl_tokens.rows import RowsFile
from benchmarks.study_kl_tokens.task import LONGEST, SIZES, Sizes
from heretic_kl.engine import Engine, Runner
from heretic_kl.errors import MeasurementError
from heretic_kl.files import cache_folder, write_text
from heretic_kl.model import (
    LanguageModel,
    ModelSource,
    load_model,
    packed_bytes,
    with_packed_weights,
)

RESULTS = Path(__file__).parents[1] / "results"
QUICK_EVERY = 10
EQUAL = ("model", "dtype", "sizes", "sequences", "edits")
"""Facts in which the runs of one file agree."""
CACHE_BYTES = 2**29


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    dtype = resolved_dtype(arguments.dtype)
    path, name = _model(arguments.model)
    name = arguments.name or name
    quick = "_quick" if arguments.quick else ""
    out = arguments.out or RESULTS / f"kl_tokens_{name}{quick}.jsonl"
    lm = load_model(ModelSource(path), dtype=dtype)
    if packed_bytes(lm):
        lm = with_packed_weights(lm)
    size = arguments.size or ("quick" if arguments.quick else "full")
    every = QUICK_EVERY if arguments.quick else arguments.every
    begins = not out.exists()
    named = {"model": name, "dtype": dtype}
    file = run_all(lm, SIZES[size], out, every, arguments.threads, named)
    if arguments.quick and begins:
        _write_time(out.with_suffix(".json"), file)


def _write_time(path: Path, file: RowsFile) -> None:
    """What the whole run took, loading and learning included."""
    facts = ("command", "date", "machine", "versions", "model", "dtype", "sizes")
    seconds = round(time.process_time())
    content = {**{name: file.header[name] for name in facts}, "edits": len(file.rows) - 1}
    write_text(path, json.dumps({**content, "cpu_seconds": seconds}, indent=1) + "\n")
    print(f"{seconds} CPU seconds in all", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="demo, base (the untaught one) or a folder")
    parser.add_argument("--name", help="of the model in its results file")
    parser.add_argument("--every", type=int, default=1, help="measure every so manieth edit")
    parser.add_argument("--quick", action="store_true", help="few edits, few prompts")
    parser.add_argument("--size", choices=list(SIZES), help="how much is measured of each edit")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--out", type=Path, help="results file")
    return parser.parse_args(argv)


def _model(setting: str) -> tuple[str, str]:
    """Folder and name."""
    from heretic_kl.demo import ensure_base_model, ensure_demo_model

    if setting in ("demo", "base"):
        ensure = ensure_demo_model if setting == "demo" else ensure_base_model
        return str(ensure(notify=print)), setting
    return setting, Path(setting).name


def run_all(
    lm: LanguageModel,
    sizes: Sizes,
    out: Path,
    every: int,
    threads: int,
    named: dict[str, str],
) -> RowsFile:
    """Measure all edits that the file lacks, a row each; says which a model does not allow.

    Args:
        lm: the model.
        sizes: how much is measured of each edit.
        out: the results file.
        every: take every such edit only.
        threads: of torch, as a fact.
        named: the model's name and dtype.
    """
    engine = Engine(lm, batch_size=40, cache_bytes=CACHE_BYTES)
    runner = Runner(lm, engine.limits)
    print("reference", flush=True)
    side = ReferenceSide(lm, runner, sizes)
    work = cache_folder() / "study_kl_tokens" / f"{named['model']}-{side.fingerprint()[:12]}"
    work.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {
        **run_facts(SEED, threads, named["dtype"], "sacrebleu", "scipy"),
        "command": command_line().replace("__main__.py", "study_kl_tokens"),
        **named,
        "sizes": vars(sizes),
        "sequences": side.fingerprint(),
        "edits": every,
    }
    if not out.exists():
        header |= {**side.facts(), "confidence": _confidence(side), "timings": side.timings()}
    file = RowsFile.open(out, header, EQUAL)
    bench = Bench(side, Builder(engine, sizes, work, lambda text: print(text, flush=True)))
    present = {row.edit for row in file.rows}
    edits = all_edits(len(lm.architecture.layers), every)
    missing = [edit for edit in edits if edit.name not in present]
    for group in grouped(missing, sizes.together):
        begun = time.perf_counter()
        try:
            for row in bench.measure(group):
                file.append(row)
        except (ValueError, MeasurementError) as error:
            print(f"{', '.join(edit.name for edit in group)}: left out: {error}", flush=True)
            continue
        wall = (time.perf_counter() - begun) / len(group)
        names = ", ".join(edit.name for edit in group)
        print(f"{len(file.rows)} of {len(edits)} ({wall:.0f} s each): {names}", flush=True)
    return file


def grouped(edits: Sequence[Edit], together: int) -> list[list[Edit]]:
    """Edits whose responses are generated side by side; learned ones and those of weights apart.

    A group stands where its last edit does, so that the order stays close to the list's.
    """
    groups: list[list[Edit]] = []
    waiting: dict[str, list[Edit]] = {}
    for edit in edits:
        if edit.changes_weights or edit.name == NOTHING:
            groups.append([edit])
            continue
        # A family that a model does not allow must not take others with it.
        key = edit.family if edit.family in ("learned", "norm mode") else "ablation"
        waiting.setdefault(key, []).append(edit)
        if len(waiting[key]) == together:
            groups.append(waiting.pop(key))
    return [*groups, *waiting.values()]


def _confidence(side: ReferenceSide) -> torch.Tensor:
    """Probability of the reference's best token at each greedy position, (P, N), NaN behind it."""
    chosen = side.sets["greedy"]
    logits = side.lm.head.logits(side.hidden[chosen.rows])
    return table(logits.softmax(dim=-1).amax(dim=-1).double(), chosen.lengths, LONGEST)


if __name__ == "__main__":
    main()
