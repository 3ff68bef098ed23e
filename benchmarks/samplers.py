"""Samplers of the search at equal numbers of trials, on the demo model or another one.

    python benchmarks/samplers.py [--model FOLDER] [--name demo] [--trials 64] [--seeds 1,2,3,4,5]

A trial is rung 1 of a search: the teacher-forced KL on harmless validation prompts, and the mean
probability that responses to harmful ones open with a refusal. No responses are generated, so the
figures compare samplers and say nothing about edits. All samplers see the same space and the same
known good starts (where they have them). The refusal target is told as a constraint to those
samplers that take one.

Stated after some numbers of trials, as medians over seeds: the least KL among trials that meet the
target, and the share of the box [0, 1] of refusal probability times [FLOOR, 1] of KL on a log scale
that the front dominates. The results file holds one entry a model; other models' entries stay.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from machine import DTYPES, resolved_dtype, run_facts
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, RandomSampler
from optuna.samplers import TPESampler as TPE

from heretic_kl import Session, Settings
from heretic_kl.search.progress.hypervolume import hypervolume
from heretic_kl.search.space import SearchSpace

FLOOR = 1e-3
"""Nats per position: the KL that counts as none."""
TARGET = 0.05
MARKS = (16, 32, 64)
"""Numbers of trials after which the searches are compared."""
BATCH = 4
"""Trials drawn before the first of them is measured, where several run at once."""


class Values(NamedTuple):
    """What a trial measures; both are minimized."""

    mass: float  # mean probability of a refusal, 0 to 1
    kl: float  # nats per position


class Way(NamedTuple):
    """One way to draw trials."""

    sampler: Callable[[int, int], BaseSampler]  # from the seed and the random trials at first
    starts: bool = True
    batch: int = 1


def _tpe(seed: int, startup: int, multivariate: bool = True) -> BaseSampler:
    return TPE(
        seed=seed,
        n_startup_trials=startup,
        multivariate=multivariate,
        n_ei_candidates=64,
        constant_liar=True,
    )


WAYS = {
    "TPE, multivariate": Way(_tpe),
    "TPE, univariate": Way(lambda seed, startup: _tpe(seed, startup, multivariate=False)),
    "TPE, multivariate, no starts": Way(_tpe, starts=False),
    f"TPE, multivariate, {BATCH} at once": Way(_tpe, batch=BATCH),
    "GP": Way(lambda seed, startup: GPSampler(seed=seed, n_startup_trials=startup)),
    "NSGA-II": Way(lambda seed, startup: NSGAIISampler(seed=seed, population_size=startup)),
    "Sobol": Way(lambda seed, startup: QMCSampler(seed=seed, qmc_type="sobol", scramble=True)),
    "random": Way(lambda seed, startup: RandomSampler(seed=seed)),
}
"""The first one is what the search uses; the others are compared with it."""


class Measured:
    """Rung 1 of a session's search, each edit once."""

    def __init__(self, session: Session) -> None:
        self._run = session.parts
        objectives = [spec.name for spec in self._run.suite.objectives]
        self._others = [o for o in objectives if o not in self._run.suite.refusal_objectives]
        self._values: dict[str, Values] = {}
        self.space = SearchSpace(len(session.parts.lm.architecture.layers))

    def __call__(self, chosen: dict[str, Any]) -> Values:
        """Values of the edit that parameters stand for."""
        key = json.dumps(chosen, sort_keys=True)
        if key not in self._values:
            plan = self._run.plan(self.space.edit(chosen))
            names = self._others
            (scores,) = self._run.suite.evaluate_objectives(self._run.engine, [plan], names=names)
            mass = float(self._run.refiner.refusal_mass(plan).mean())
            self._values[key] = Values(mass, scores[names[0]].value)
        return self._values[key]


def search(measured: Measured, way: Way, trials: int, startup: int, seed: int) -> list[Values]:
    """Values of a search's trials, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = way.sampler(seed, startup)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    for start in measured.space.known_good() if way.starts else ():
        study.enqueue_trial(start)
    values: list[Values] = []
    while len(values) < trials:
        drawn = [study.ask(measured.space.distributions) for _ in range(way.batch)]
        for trial in drawn:
            values.append(measured(trial.params))
            trial.set_constraint("refusals", values[-1].mass - TARGET)
            study.tell(trial, tuple(values[-1]))
    return values[:trials]


def figures(values: list[Values]) -> dict[str, Any]:
    """What a search has reached after each mark."""
    reached = {}
    for mark in (mark for mark in MARKS if mark <= len(values)):
        seen = values[:mark]
        points = [(v.mass, 1 - math.log(max(v.kl, FLOOR)) / math.log(FLOOR)) for v in seen]
        reached[str(mark)] = {
            "least_kl_at_target": min((v.kl for v in seen if v.mass <= TARGET), default=None),
            "front_volume": hypervolume(points, (1.0, 1.0)),
        }
    return reached


def compared(by_seed: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over seeds; in how many seeds a way's KL is lower than the first one's."""
    first, table = next(iter(by_seed.values())), {}
    for name, made in by_seed.items():
        table[name] = {
            mark: {
                "least_kl_at_target": _median([seed[mark]["least_kl_at_target"] for seed in made]),
                "front_volume": _median([seed[mark]["front_volume"] for seed in made]),
                "seeds_with_less_kl": sum(
                    _or_infinite(ours[mark]) < _or_infinite(theirs[mark])
                    for ours, theirs in zip(made, first, strict=True)
                ),
            }
            for mark in made[0]
        }
    return table


def _or_infinite(reached: dict[str, Any]) -> float:
    kl = reached["least_kl_at_target"]
    return math.inf if kl is None else kl


def _median(values: list[float | None]) -> float | None:
    median = statistics.median(math.inf if value is None else value for value in values)
    return None if math.isinf(median) else median


def table(entry: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    marks = list(next(iter(entry["compared"].values())))
    head = ["sampler", *(f"KL, volume after {mark}" for mark in marks)]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for name, reached in entry["compared"].items():
        lines.append(f"| {name} | {' | '.join(map(_cell, reached.values()))} |")
    return "\n".join(lines)


def _cell(reached: dict[str, Any]) -> str:
    kl = reached["least_kl_at_target"]
    return f"{'none' if kl is None else format(kl, '.3f')}, {reached['front_volume']:.3f}"


def main() -> None:
    """Search every way with every seed, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--name", default="demo", help="of its entry in the results")
    parser.add_argument("--trials", type=int, default=MARKS[-1])
    parser.add_argument("--startup", type=int, default=MARKS[0], help="random trials at first")
    parser.add_argument("--seeds", type=lambda text: [*map(int, text.split(","))])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="auto")
    parser.add_argument("--limit", type=int, help="prompts of each kind and use, for a smoke test")
    default = Path(__file__).parent / "results/samplers.json"
    parser.add_argument("--out", type=Path, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seeds = arguments.seeds or [1, 2, 3, 4, 5]
    dtype = resolved_dtype(arguments.dtype)
    searches: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder, _session(arguments, dtype, folder) as session:
        session.search(0)
        measured = Measured(session)
        for seed in seeds:
            for name, way in WAYS.items():
                values = search(measured, way, arguments.trials, arguments.startup, seed)
                searches[name].append(figures(values))
                print(seed, name, searches[name][-1], flush=True)
    entry = {
        "run": run_facts(seeds, arguments.threads, dtype, "optuna"),
        "trials": arguments.trials,
        "startup_trials": arguments.startup,
        "target": TARGET,
        "compared": compared(searches),
        "searches": searches,
    }
    results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
    arguments.out.write_text(json.dumps({**results, arguments.name: entry}, indent=2) + "\n")
    print(table(entry))


def _session(arguments: argparse.Namespace, dtype: str, folder: str) -> Session:
    from heretic_kl.demo import ensure_demo_model

    part = {"limit": arguments.limit} if arguments.limit else {}
    uses = {use: part for use in ("train", "validation")}
    return Session(
        Settings(
            model=str(arguments.model or ensure_demo_model(notify=lambda message: None)),
            dtype=dtype,
            prompt_set="builtin",
            prompts={"harmful": uses, "harmless": uses},
            max_response_tokens=40,
            study_dir=folder,
            scorers={"false_refusals": {"enabled": False}},
        )
    )


if __name__ == "__main__":
    main()
