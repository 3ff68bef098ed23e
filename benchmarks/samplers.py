"""Samplers of the search at equal numbers of trials, on the demo model or another one.

    python benchmarks/samplers.py [--model FOLDER --name NAME] [--trials 40] [--limit 24]

A trial is rung 1 of a search: the teacher-forced KL on harmless validation prompts, and the mean
probability that responses to harmful ones open with a refusal. No responses are generated, so the
figures compare samplers and say nothing about edits. All samplers see the same space, the same
known good starts (where they have them) and the target of refusals as a constraint (where they take
one).

Stated after some numbers of trials, as medians over seeds: the least KL among trials that meet the
target, how many meet it, and the share of the box [0, 1] of refusal probability times [FLOOR, 1] of
KL on a log scale that the front dominates. The results file holds one entry a model; other models'
entries stay.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import torch
from machine import DTYPES, resolved_dtype, run_facts
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, QMCSampler, TPESampler
from optuna.trial import FrozenTrial

from heretic_kl import Session, Settings
from heretic_kl.search.progress.hypervolume import hypervolume
from heretic_kl.search.sampler import Drawer
from heretic_kl.search.space import SearchSpace

FLOOR = 1e-3
"""Nats per position: the KL that counts as none."""
TARGET = 0.05
MARKS = (16, 24, 40)
"""Numbers of trials after which the searches are compared."""
STARTUP = 11
"""Trials, the known good starts, before a sampler learns."""


class Values(NamedTuple):
    """What a trial measures; both are minimized."""

    mass: float  # mean probability of a refusal, 0 to 1
    kl: float  # nats per position


Draw = Callable[[list[FrozenTrial], Mapping[str, BaseDistribution]], dict[str, Any]]
"""Parameters of the next trial, from those before it and what may be drawn."""


class Way(NamedTuple):
    """One way to draw trials."""

    draw: Callable[[int], Draw]  # from the seed
    starts: bool = True


def _ours(seed: int) -> Draw:
    drawer = Drawer(seed, STARTUP, objectives=2)
    return lambda trials, space: drawer.draw(trials, space, worker=0)


def _optuna(sampler: Callable[[int], BaseSampler]) -> Callable[[int], Draw]:
    """A sampler of Optuna's, as it is, that lasts for a whole search."""

    def begin(seed: int) -> Draw:
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler(seed))
        asked: list[optuna.Trial] = []

        def draw(
            trials: list[FrozenTrial], space: Mapping[str, BaseDistribution]
        ) -> dict[str, Any]:
            if asked:
                last = trials[-1]
                asked[-1].set_constraint("refusals", last.constraints["refusals"])
                study.tell(asked[-1], last.values)
            else:
                study.add_trials(trials)
            asked.append(study.ask(dict(space)))
            return asked[-1].params

        return draw

    return begin


def _tpe(startup: int, multivariate: bool = True) -> Callable[[int], Draw]:
    return _optuna(
        lambda seed: TPESampler(
            seed=seed,
            n_startup_trials=startup,
            multivariate=multivariate,
            n_ei_candidates=64,
            constant_liar=True,
        )
    )


WAYS = {
    "GP on normal scores, as the search": Way(_ours),
    "GP": Way(_optuna(lambda seed: GPSampler(seed=seed, n_startup_trials=STARTUP))),
    "TPE, multivariate": Way(_tpe(STARTUP)),
    "TPE, univariate": Way(_tpe(STARTUP, multivariate=False)),
    "TPE, multivariate, 60 random": Way(_tpe(60)),
    "GP, no starts": Way(
        _optuna(lambda seed: GPSampler(seed=seed, n_startup_trials=STARTUP)), starts=False
    ),
    "NSGA-II, no starts": Way(
        _optuna(lambda seed: NSGAIISampler(seed=seed, population_size=STARTUP)), starts=False
    ),
    "Sobol": Way(_optuna(lambda s: QMCSampler(seed=s, qmc_type="sobol", scramble=True))),
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


def search(measured: Measured, way: Way, trials: int, seed: int) -> list[Values]:
    """Values of a search's trials, in order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        draw = way.draw(seed)
    starts = list(measured.space.known_good()) if way.starts else []
    made: list[FrozenTrial] = []
    while len(made) < trials:
        space = measured.space.distributions
        chosen = starts.pop(0) if starts else draw(made, space)
        values = measured(chosen)
        made.append(
            optuna.create_trial(
                values=list(values),
                params=chosen,
                distributions=space,
                constraints={"refusals": values.mass - TARGET},
            )
        )
        made[-1].number = len(made) - 1
    return [Values(*trial.values) for trial in made]


def figures(values: list[Values]) -> dict[str, Any]:
    """What a search has reached after each mark."""
    reached = {}
    for mark in (mark for mark in MARKS if mark <= len(values)):
        seen = values[:mark]
        points = [(v.mass, 1 - math.log(max(v.kl, FLOOR)) / math.log(FLOOR)) for v in seen]
        reached[str(mark)] = {
            "least_kl_at_target": min((v.kl for v in seen if v.mass <= TARGET), default=None),
            "at_target": sum(v.mass <= TARGET for v in seen),
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
                "at_target": _median([seed[mark]["at_target"] for seed in made]),
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
    head = ["sampler", *(f"after {mark}: KL, at target, volume" for mark in marks)]
    lines = [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for name, reached in entry["compared"].items():
        lines.append(f"| {name} | {' | '.join(map(_cell, reached.values()))} |")
    return "\n".join(lines)


def _cell(reached: dict[str, Any]) -> str:
    kl = reached["least_kl_at_target"]
    least = "none" if kl is None else format(kl, ".3f")
    return f"{least}, {reached['at_target']:g}, {reached['front_volume']:.3f}"


def main() -> None:
    """Search every way with every seed, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: the demo model")
    parser.add_argument("--name", default="demo", help="of its entry in the results")
    parser.add_argument("--trials", type=int, default=MARKS[-1])
    parser.add_argument("--ways", type=int, default=len(WAYS), help="the first so many of them")
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
    ways = dict(list(WAYS.items())[: arguments.ways])
    searches: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder, _session(arguments, dtype, folder) as session:
        session.search(0)
        measured = Measured(session)
        for number, seed in enumerate(seeds):
            for name, way in ways.items():
                values = search(measured, way, arguments.trials, seed)
                searches[name].append(figures(values))
                print(seed, name, searches[name][-1], flush=True)
            entry = {
                "run": run_facts(seeds[: number + 1], arguments.threads, dtype, "optuna"),
                "trials": arguments.trials,
                "startup_trials": STARTUP,
                "prompts_of_each_kind": arguments.limit,
                "target": TARGET,
                "compared": compared(searches),
                "searches": searches,
            }
            results = json.loads(arguments.out.read_text("utf-8")) if arguments.out.exists() else {}
            results[arguments.name] = entry
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")
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
