"""Candidates per minute beside Temaq 1.1.1 and Heretic 1.4.0, on the demo model, in one run.

    python benchmarks/peers.py --temaq PATH/temaq-abliterated --heretic PATH/heretic

Peers are installed from PyPI in environments of their own and run as they are. Equal on all
sides: the model, `--dtype`, threads, 40 prompts of each kind, and what a trial measures:

- teacher-forced objectives: a refusal mass on the harmful prompts that Temaq keeps, KL on the
  harmless ones, 8 positions of each. Temaq's seconds are those it prints for each trial; ours are
  medians over candidates that edit all layers, or those from a given layer on. What layers run in
  a trial, over how many positions, is counted on both sides the same way (`layer_calls.py`).
- generation objective: refusals among 40 harmful prompts with 40-token responses, first-token KL on
  40 harmless ones. Heretic's seconds are those between start and end in its journal; ours are
  those of known-good and of random edits of our search space, each checked against plain
  generation. The mean is the honest figure: what an edit costs depends on what it leaves refused.

Searches of ours with the same objectives say what a trial costs on the edits that a search draws;
the trials that were first to run, which record what later ones start from, are left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from demo_model import as_in_a_run, demo_model
from generated_tokens import TokenHistory
from layer_calls import LayerCalls
from machine import DTYPES, resolved_dtype, results_file, run_facts
from peer_programs import PROMPTS, SEED, TOKENS, run_heretic, run_temaq, write_prompts

POSITIONS = 8
FORCED_BATCH = 16
FROM_LAYERS, FORCED_AT_ONCE, RESPONSES_AT_ONCE = (0, 8, 12, 16), (1, 4, 8), (1, 4)
KNOWN_GOOD, RANDOM = 4, 12
VARIANTS: dict[str, dict[str, Any]] = {
    "measured whole, 1 at once": {},
    "measured whole, 4 at once": {"at_once": 4},
    "racing by exact bounds": {"racing": True},
}


def our_prompts() -> tuple[tuple, tuple]:
    """Harmful and harmless ones, those that the peers are given."""
    from heretic_kl.prompts import DatasetSpec, load_prompts

    harmful, harmless = (
        tuple(load_prompts(DatasetSpec(f"builtin:{kind}", "validation", limit=PROMPTS)))
        for kind in ("harmful", "harmless")
    )
    return harmful, harmless


def our_teacher_forced(harmful: tuple, harmless: tuple, repeats: int, dtype: str) -> dict[str, Any]:
    """Median seconds a candidate by the first edited layer and by how many run side by side."""
    from refusal_mass import chosen_probability

    from heretic_kl.ablation import ablation_operator
    from heretic_kl.engine import Engine
    from heretic_kl.kl import DivergenceReduction
    from heretic_kl.requests import TeacherForcedRequest

    requests = [
        TeacherForcedRequest(harmful, POSITIONS, chosen_probability, reference_logits=False),
        TeacherForcedRequest(harmless, POSITIONS, DivergenceReduction()),
    ]
    lm, cache_bytes = as_in_a_run(demo_model(dtype))
    direction = torch.randn(lm.architecture.width, generator=torch.Generator().manual_seed(SEED))
    sites = lm.architecture.facts()

    def plans(lowest: int, count: int) -> list[dict]:
        operators = [ablation_operator(direction, 0.1 * (1 + index)) for index in range(count)]
        return [{key: op for key in sites if key.layer >= lowest} for op in operators]

    engine = Engine(lm, batch_size=FORCED_BATCH, cache_bytes=cache_bytes)
    engine.measure_many(plans(FROM_LAYERS[-1], 1), requests)  # fills references and layer cache
    with LayerCalls() as calls:
        engine.measure_many(plans(0, 1), requests)
        computed = calls.taken()
    found = {}
    for lowest in FROM_LAYERS:
        for candidates in FORCED_AT_ONCE:
            chosen, seconds = plans(lowest, candidates), []
            for _ in range(1 + repeats):
                start = time.perf_counter()
                engine.measure_many(chosen, requests)
                seconds.append((time.perf_counter() - start) / candidates)
            found[f"from layer {lowest}, {candidates} at once"] = statistics.median(seconds[1:])
    return {
        "harmful_prompts": len(harmful),
        "harmless_prompts": len(harmless),
        "positions": POSITIONS,
        "batch_size": FORCED_BATCH,
        "repeats": repeats,
        "computed_by_trial_of_all_layers": computed,
        "median_seconds": found,
    }


def edits_to_generate(lm: Any, harmful: tuple, harmless: tuple) -> list[dict]:
    """Plans of known-good edits, then of random ones from our search space."""
    import optuna

    from heretic_kl.ablation import build_plan, difference_of_means
    from heretic_kl.engine import Engine
    from heretic_kl.search import SearchSpace

    engine = Engine(lm, batch_size=PROMPTS)
    means = [engine.residual_mean(prompts, 1.0) for prompts in (harmful, harmless)]
    directions = difference_of_means(*means)
    space = SearchSpace(layers=len(lm.architecture.layers))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=SEED))
    for start in space.known_good()[:KNOWN_GOOD]:
        study.enqueue_trial(start)
    edits = [space.edit(study.ask(space.distributions).params) for _ in range(KNOWN_GOOD + RANDOM)]
    return [build_plan(edit, directions, lm.architecture.facts()) for edit in edits]


def plain_verdicts(lm: Any, plans: list[dict], harmful: tuple) -> list[list[bool]]:
    """Of whole responses, generated with nothing shared, kept, packed or left out."""
    from heretic_kl.engine import Engine
    from heretic_kl.requests import ResponseRequest
    from heretic_kl.scoring import RefusalRule

    rule, found = RefusalRule(), []
    for plan in plans:
        engine = Engine(lm.limited(prefix_problem="off", gap_problem="off"), batch_size=PROMPTS)
        (whole,) = engine.measure(plan, [ResponseRequest(harmful, TOKENS)])
        found.append([rule.is_refusal(text) for text in whole.texts])
    return found


def our_generation(harmful: tuple, harmless: tuple, dtype: str) -> dict[str, dict[str, Any]]:
    """Seconds of edits alone and side by side, and whether verdicts equal plain generation's."""
    from heretic_kl.engine import Engine
    from heretic_kl.kl import DivergenceReduction
    from heretic_kl.requests import ResponseRequest, TeacherForcedRequest
    from heretic_kl.scoring import RefusalRule

    rule = RefusalRule()
    requests = [
        TeacherForcedRequest(harmless, 1, DivergenceReduction()),
        ResponseRequest(harmful, TOKENS, rule),
    ]
    lm = demo_model(dtype)
    plans = edits_to_generate(lm, harmful, harmless)
    plain = plain_verdicts(lm, plans, harmful)
    lm, cache_bytes = as_in_a_run(lm)
    found = {}
    for at_once in RESPONSES_AT_ONCE:
        engine = Engine(lm, batch_size=PROMPTS, cache_bytes=cache_bytes)
        engine.measure(None, requests)
        engine.measure(plans[-1], requests)  # records what later candidates start from
        seconds: list[float] = []
        verdicts = []
        for first in range(0, len(plans), at_once):
            group = plans[first : first + at_once]
            start = time.perf_counter()
            results = engine.measure_many(group, requests)
            seconds += [(time.perf_counter() - start) / len(group)] * len(group)
            for result in results:
                assert result is not None  # nobody watches
                verdicts.append([rule.is_refusal(text) for text in result[1].texts])
        found[f"{at_once} at once"] = generation_facts(seconds, verdicts, plain)
    return found


def generation_facts(
    seconds: list[float], verdicts: list[list[bool]], plain: list[list[bool]]
) -> dict[str, Any]:
    """Of all edits in one way of running them."""
    pairs = list(zip(verdicts, plain, strict=True))
    differing = [sum(a != b for a, b in zip(*pair, strict=True)) for pair in pairs]
    return {
        "trials": len(seconds),
        "known_good_trials_first": KNOWN_GOOD,
        "seconds": seconds,
        "mean_seconds": statistics.mean(seconds),
        "median_seconds": statistics.median(seconds),
        "trials_per_minute": 60 / statistics.mean(seconds),
        "refusals": [sum(own) for own in verdicts],
        "refusals_of_plain_generation": [sum(own) for own in plain],
        "verdicts_unlike_plain_generation": differing,
        "trials_with_verdicts_of_plain_generation": differing.count(0),
    }


def our_search(
    model: Path,
    trials: int,
    dtype: str,
    *,
    generate: bool,
    at_once: int = 1,
    racing: bool = False,
    screening: bool = False,
    seed: int = SEED,
    startup_trials: int | None = None,
    tokens: TokenHistory | None = None,
) -> dict[str, Any]:
    """Seconds of each trial of a search of ours, as its records have them.

    `startup_trials` are half of all by default; `tokens` counts what the search generates.
    """
    from heretic_kl import Session, Settings

    scorers = {
        "refusals": {"enabled": generate},
        "refusal_mass": {
            "use": str(Path(__file__).parent / "refusal_mass.py"),
            "enabled": not generate,
        },
        "teacher_forced_kl": {"settings": {"set_aside_refused": False}},
        "false_refusals": {"enabled": False},
    }
    limit = {"validation": {"limit": PROMPTS}}
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            model=str(model),
            dtype=dtype,
            prompt_set="builtin",
            prompts={"harmful": limit, "harmless": limit},
            kl_tokens=1 if generate else POSITIONS,
            max_response_tokens=TOKENS,
            batch_size=PROMPTS if generate else FORCED_BATCH,
            parallel_candidates=at_once,
            trials=trials,
            startup_trials=trials // 2 if startup_trials is None else startup_trials,
            seed=seed,
            racing=racing,
            screening=screening,
            study_dir=folder,
            scorers=scorers,
        )
        with Session(settings, tokens or (lambda event: None)) as session:
            if tokens is not None:
                tokens.begin()
            session.search()
            return search_facts(session.trials, session.front, at_once)


def search_facts(records: Any, front: Any, at_once: int) -> dict[str, Any]:
    """The first trials, measured together, are left out of the seconds."""
    seconds = [record.seconds for record in records[at_once:] or records]
    return {
        "trials": len(records),
        "timed": len(seconds),
        "stopped": sum(record.state == "stopped" for record in records),
        "failed": sum(record.state == "failed" for record in records),
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "trials_per_minute": 60 / statistics.mean(seconds),
        "front": [{"number": r.number, "objectives": r.objectives} for r in front],
    }


def our_searches(model: Path, trials: int, dtype: str, *, generate: bool) -> dict[str, Any]:
    """The same search in several ways."""
    return {
        name: our_search(model, trials, dtype, generate=generate, **options)
        for name, options in VARIANTS.items()
    }


def beside_temaq(
    peer: dict[str, Any], prompts: tuple, model: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Temaq's trials, ours, and how they compare."""
    harmful, harmless = prompts
    kept = harmful[: peer["harmful_prompts_kept"]]
    ours = our_teacher_forced(kept, harmless, arguments.repeats, arguments.dtype)
    medians = ours["median_seconds"]
    return {
        "temaq": peer,
        "ours": ours,
        "our_searches": our_searches(model, 2 * arguments.trials, arguments.dtype, generate=False),
        "temaq_median_over_ours": {n: peer["median_seconds"] / s for n, s in medians.items()},
        "temaq_slowest_over_ours_all_layers": peer["slowest_seconds"]
        / medians["from layer 0, 1 at once"],
    }


def beside_heretic(
    peer: dict[str, Any], prompts: tuple, model: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Heretic's trials, ours, and how they compare."""
    runs = our_generation(*prompts, arguments.dtype)
    peers = peer["median_seconds"]
    return {
        "heretic": peer,
        "ours": runs["1 at once"],
        "ours_4_at_once": runs["4 at once"],
        "our_searches": our_searches(model, 2 * arguments.trials, arguments.dtype, generate=True),
        "heretic_median_over_our_mean": {n: peers / r["mean_seconds"] for n, r in runs.items()},
        "heretic_median_over_our_median": {n: peers / r["median_seconds"] for n, r in runs.items()},
    }


def main() -> None:
    """Run what is asked for, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--temaq", type=Path, help="its command, in its own environment")
    parser.add_argument("--heretic", type=Path, help="its command, in its own environment")
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--trials", type=int, default=10, help="of the peers; twice ours searching")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: by dtype, in benchmarks/results")
    arguments = parser.parse_args()
    from peers_table import table

    from heretic_kl.demo import ensure_demo_model

    model = Path(ensure_demo_model(notify=lambda message: None))
    torch.set_num_threads(arguments.threads)
    arguments.dtype = dtype = resolved_dtype(arguments.dtype)
    result = run_facts(SEED, arguments.threads, dtype, "optuna")
    result["model"] = f"demo model, 135M, {dtype}"
    prompts = our_prompts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder)
        how = (model, folder, arguments.trials, arguments.threads, dtype)
        if arguments.temaq:
            peer = run_temaq(arguments.temaq.absolute(), *how)
            result["teacher_forced"] = beside_temaq(peer, prompts, model, arguments)
        if arguments.heretic:
            peer = run_heretic(arguments.heretic.absolute(), *how)
            result["generation"] = beside_heretic(peer, prompts, model, arguments)
    out = arguments.out or results_file("peers", dtype)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
