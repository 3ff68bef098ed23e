"""Candidates per minute beside Temaq 1.1.1 and Heretic 1.4.0, on the demo model, in one run.

    python benchmarks/peers.py --temaq PATH/temaq-abliterated --heretic PATH/heretic

Peers are installed from PyPI in environments of their own and run as they are. Equal on all
sides: the model, float32, threads, 40 prompts of each kind, and what a trial measures:

- teacher-forced objective: 8 positions of every prompt (Temaq drops harmful prompts that the
  model does not refuse; ours then runs as many). Temaq's seconds are those it prints for each
  trial; ours are medians over candidates that edit all layers, or those from a given layer on.
  A search of ours with the same objectives (`refusal_mass.py` and KL), racing off and on, says
  what a trial costs on the edits that a search really draws.
- generation objective: refusals among 40 harmful prompts with 40-token answers, first-token KL on
  40 harmless ones. Heretic's seconds are those between start and end in its journal; ours are
  those of random edits from our search space, each checked against plain generation, and of
  searches, racing off and on.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date, datetime
from pathlib import Path

import torch
from machine import library_versions, machine_facts

PROMPTS, TOKENS, POSITIONS, SEED = 40, 40, 8, 1
FROM_LAYERS = (0, 8, 12, 16)


def write_prompts(folder: Path) -> None:
    """Plain text files, one prompt a line, for the peers."""
    from heretic_kl.prompts import DatasetSpec, load_prompts

    for kind, name in (("harmful", "bad"), ("harmless", "good")):
        for split, use in (("train", "train"), ("search", "eval")):
            prompts = load_prompts(DatasetSpec(f"builtin:{kind}", split, limit=PROMPTS))
            lines = [" ".join(prompt.user.split()) for prompt in prompts]
            (folder / f"{name}_{use}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run_temaq(program: Path, model: Path, folder: Path, trials: int, threads: int) -> dict:
    """Its own search; seconds of each trial as it prints them."""
    words = [str(program), str(model), "--workdir", "t", "--eval-dtype", "float32"]
    words += ["--trials", str(trials), "--harmful-file", "bad_eval.txt"]
    words += ["--harmless-file", "good_eval.txt", "--n-probe", str(PROMPTS), "--verify", "none"]
    words += ["--max-new-tokens", str(TOKENS), "--select", "auto", "--no-report", "--dry-run"]
    words += ["--seed", str(SEED), "--output", "out"]
    done = subprocess.run(
        words, cwd=folder, env=environment(threads), capture_output=True, text=True, check=True
    )
    text = done.stdout + done.stderr
    seconds = [float(s) for s in re.findall(r"Trial\s+\d+/\d+\s*\|\s*([\d.]+)s", text)]
    kept = re.search(r"Kept (\d+)/\d+ harmful", text)
    return {
        "version": "1.1.1",
        "trials": len(seconds),
        "harmful_prompts_kept": int(kept[1]) if kept else PROMPTS,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "slowest_seconds": max(seconds),
        "fastest_seconds": min(seconds),
    }


def run_heretic(program: Path, model: Path, folder: Path, trials: int, threads: int) -> dict:
    """Its own search in a pseudo-terminal, ended when its journal holds all trials."""
    prompts = {"good_prompts": "good_train", "bad_prompts": "bad_train"}
    prompts |= {"good_evaluation_prompts": "good_eval", "bad_evaluation_prompts": "bad_eval"}
    config = [f'model = "{model}"', f"n_trials = {trials}", f"n_startup_trials = {trials}"]
    config += [f"batch_size = {PROMPTS}", f"max_response_length = {TOKENS}", 'response_prefix = ""']
    config += [f"seed = {SEED}", 'study_checkpoint_dir = "ckpt"', 'dtypes = ["float32"]']
    for name, file in prompts.items():
        config += [f"[{name}]", f'dataset = "{file}.txt"']
    (folder / "config.toml").write_text("\n".join(config) + "\n", encoding="utf-8")
    main, worker = pty.openpty()
    process = subprocess.Popen(
        [str(program)], cwd=folder, env=environment(threads), stdin=worker, stdout=worker,
        stderr=worker,
    )  # fmt: skip
    os.set_blocking(main, False)
    seconds: list[float] = []
    give_up = time.monotonic() + 1500
    while len(seconds) < trials and process.poll() is None and time.monotonic() < give_up:
        time.sleep(2)
        try:
            os.read(main, 2**20)  # keep the terminal from filling up
        except BlockingIOError:
            pass
        seconds = journal_seconds(folder / "ckpt")
    process.kill()
    if not seconds:
        raise SystemExit("Heretic finished no trial: run it by hand in " + str(folder))
    return {
        "version": "1.4.0",
        "trials": len(seconds),
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
    }


def journal_seconds(folder: Path) -> list[float]:
    """Durations of finished trials in Optuna journals."""
    starts: list[str] = []
    found = []
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        for line in file.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if "datetime_start" in entry:
                starts.append(entry["datetime_start"])
            if "datetime_complete" in entry and "trial_id" in entry:
                start = datetime.fromisoformat(starts[entry["trial_id"]])
                end = datetime.fromisoformat(entry["datetime_complete"])
                found.append((end - start).total_seconds())
    return found


def environment(threads: int) -> dict[str, str]:
    """Offline, with as many threads as ours."""
    count = str(threads)
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}


def our_model(model: Path):
    """The demo model, and 40 prompts of each kind."""
    from heretic_kl.model import ModelSource, load_model
    from heretic_kl.prompts import DatasetSpec, load_prompts

    lm = load_model(ModelSource(str(model)), dtype="float32")
    kinds = ("harmful", "harmless")
    specs = [DatasetSpec(f"builtin:{kind}", "search", limit=PROMPTS) for kind in kinds]
    return lm, *(tuple(load_prompts(spec)) for spec in specs)


def our_teacher_forced(lm, harmful, harmless, kept: int, repeats: int) -> dict:
    """Median seconds a candidate by the first edited layer and by how many run side by side."""
    from heretic_kl.ablation import ablation_operator
    from heretic_kl.engine import Engine
    from heretic_kl.kl import row_statistics
    from heretic_kl.requests import TeacherForcedRequest

    prompts = harmful[:kept] + harmless
    request = TeacherForcedRequest(prompts, POSITIONS, row_statistics)
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(SEED))

    def plan(lowest: int, weight: float) -> dict:
        sites = lm.architecture.facts()
        return {k: ablation_operator(direction, weight) for k in sites if k.layer >= lowest}

    found = {}
    for lowest in FROM_LAYERS:
        for candidates in (1, 4):
            engine = Engine(lm, batch_size=16, trunk_bytes=2**30)
            plans = [plan(lowest, 0.1 * (1 + i)) for i in range(candidates)]
            engine.measure_many(plans, [request])
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                engine.measure_many(plans, [request])
                seconds.append((time.perf_counter() - start) / candidates)
            found[f"from layer {lowest}, {candidates} at once"] = statistics.median(seconds)
    return {"prompts": len(prompts), "positions": POSITIONS, "median_seconds": found}


def our_generation(lm, harmful, harmless, trials: int) -> dict:
    """Seconds of random edits from our space, and whether verdicts equal plain generation's."""
    import optuna

    from heretic_kl.ablation import build_plan, difference_of_means
    from heretic_kl.engine import Engine
    from heretic_kl.kl import row_statistics
    from heretic_kl.requests import ResponseRequest, TeacherForcedRequest
    from heretic_kl.scoring import RefusalRule
    from heretic_kl.search import SearchSpace

    rule = RefusalRule()
    engine = Engine(lm, batch_size=PROMPTS, trunk_bytes=2**30, draft_answers=False)
    means = [engine.residual_mean(prompts, 1.0) for prompts in (harmful, harmless)]
    directions = difference_of_means(*means)
    space = SearchSpace(layers=len(lm.architecture.layers))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    requests = [
        TeacherForcedRequest(harmless, 1, row_statistics),
        ResponseRequest(harmful, TOKENS, rule),
    ]
    engine.measure(None, requests)
    seconds, refusals, same = [], [], []
    for _ in range(trials):
        edit = space.edit(space.suggest(study.ask()))
        plan = build_plan(edit, directions, lm.architecture.facts())
        start = time.perf_counter()
        _, answers = engine.measure(plan, requests)
        seconds.append(time.perf_counter() - start)
        verdicts = [rule.is_refusal(text) for text in answers.texts]
        refusals.append(sum(verdicts))
        plain = Engine(lm, batch_size=PROMPTS, share_prefix=False)
        (whole,) = plain.measure(plan, [ResponseRequest(harmful, TOKENS)])
        same.append(verdicts == [rule.is_refusal(text) for text in whole.texts])
    return {
        "trials": trials,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "refusals": refusals,
        "trials_with_verdicts_of_plain_generation": sum(same),
    }


def our_search(model: Path, trials: int, *, generate: bool, racing: bool) -> dict:
    """Seconds of each trial of a search of ours, as its records have them."""
    from heretic_kl import Session, Settings

    kl = {"settings": {"set_aside_refused": False}}
    mass = {"use": str(Path(__file__).parent / "refusal_mass.py"), "enabled": not generate}
    limit = {"search": {"limit": PROMPTS}}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            model=str(model),
            dtype="float32",
            prompt_set="builtin",
            prompts={"harmful": limit, "harmless": limit},
            kl_tokens=1 if generate else POSITIONS,
            max_answer_tokens=TOKENS,
            batch_size=PROMPTS if generate else 16,
            trials=trials,
            startup_trials=trials // 2,
            seed=SEED,
            racing=racing,
            study_dir=folder,
            scorers={
                "refusals": {"enabled": generate},
                "refusal_mass": mass,
                "teacher_forced_kl": kl,
                "false_refusals": {"enabled": False},
            },
        )
        with Session(settings, lambda event: None) as session:
            session.search()
            records, front = session.trials, session.front
    seconds = [record.seconds for record in records[1:]]  # the first one records the trunk
    return {
        "trials": len(records),
        "stopped": sum(record.state == "stopped" for record in records),
        "front": [record.number for record in front],
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "trials_per_minute": 60 / statistics.mean(seconds),
    }


def our_searches(model: Path, trials: int, *, generate: bool) -> dict:
    """The same search without racing and with it."""
    return {
        name: our_search(model, trials, generate=generate, racing=racing)
        for name, racing in (("measured whole", False), ("racing", True))
    }


def main() -> None:
    """Run what is asked for, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--temaq", type=Path, help="its command, in its own environment")
    parser.add_argument("--heretic", type=Path, help="its command, in its own environment")
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/peers.json")
    arguments = parser.parse_args()
    from heretic_kl.demo import ensure_demo_model

    model = Path(ensure_demo_model(notify=lambda message: None))
    torch.set_num_threads(arguments.threads)
    result = {
        "command": "python benchmarks/peers.py",
        "date": date.today().isoformat(),
        "seed": SEED,
        "machine": machine_facts(arguments.threads),
        "versions": library_versions("optuna"),
        "model": "demo model, 135M, float32",
    }
    lm, harmful, harmless = our_model(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder)
        if arguments.temaq:
            program, trials = arguments.temaq.absolute(), arguments.trials
            peer = run_temaq(program, model, folder, trials, arguments.threads)
            kept = peer["harmful_prompts_kept"]
            ours = our_teacher_forced(lm, harmful, harmless, kept, arguments.repeats)
            ratios = {
                name: peer["median_seconds"] / seconds
                for name, seconds in ours["median_seconds"].items()
            }
            result["teacher_forced"] = {
                "temaq": peer,
                "ours": ours,
                "our_searches": our_searches(model, 2 * trials, generate=False),
                "temaq_trials_per_minute": 60 / statistics.mean(peer["seconds"]),
                "temaq_median_over_ours": ratios,
                "temaq_slowest_over_ours_all_layers": peer["slowest_seconds"]
                / ours["median_seconds"]["from layer 0, 1 at once"],
            }
        if arguments.heretic:
            program, trials = arguments.heretic.absolute(), arguments.trials
            peer = run_heretic(program, model, folder, trials, arguments.threads)
            ours = our_generation(lm, harmful, harmless, arguments.trials)
            result["generation"] = {
                "heretic": peer,
                "ours": ours,
                "our_searches": our_searches(model, 2 * trials, generate=True),
                "heretic_trials_per_minute": 60 / statistics.mean(peer["seconds"]),
                "heretic_median_over_ours": peer["median_seconds"] / ours["median_seconds"],
            }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    sys.exit(main())
