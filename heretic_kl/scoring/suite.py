"""Scorers in order, prepared for one use of the prompts; the engine is behind a Protocol."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import torch

from heretic_kl.ablation import Plan
from heretic_kl.errors import ConfigError, HereticKLError, MeasurementError, ScorerError
from heretic_kl.ranks import on_first
from heretic_kl.requests import Request, Result, SoFar, TeacherForcedRequest, Watch
from heretic_kl.scoring.loader import build_scorer
from heretic_kl.scoring.racing import Judge, Race, Rival, Stopped
from heretic_kl.scoring.refusal_count import RefusalCount
from heretic_kl.scoring.refusal_rule import RefusalRule
from heretic_kl.scoring.scorer import Bounds, Role, Score, ScorerContext

REFUSALS: Final = "refusals"
"""Name of the scorer that counts refusals of harmful prompts by default."""
KL_TOKENS: Final = "kl_tokens"
"""In the details of a score: N, the positions of a response that its scorer compares at most."""
JUDGING: Final = ("requests", "retries", "timeouts", "prompt_tokens", "answer_tokens", "cost")
"""What is summed of judges."""


@dataclass(frozen=True)
class ScorerSpec:
    """One scorer as the config names it."""

    name: str
    use: str
    role: Role
    settings: Mapping[str, Any]


class MeasuringEngine(Protocol):
    """The part of the engine that scoring needs."""

    def measure(self, plan: Plan | None, requests: Sequence[Request]) -> list[Result]:
        """Results of requests for one candidate; None is the unedited model."""
        ...

    def measure_many(
        self,
        plans: Sequence[Plan | None],
        requests: Sequence[Request],
        watch: Watch | None = None,
    ) -> list[list[Result] | None]:
        """Results of requests for several candidates, in order; None where `watch` ended one."""
        ...


class Suite:
    """Scorers in the order of the config, with their roles; at least one is an objective.

    Raises:
        ConfigError: two scorers share a name (case and dashes aside), or none is an objective.
        ScorerError: a scorer cannot be found.
    """

    def __init__(self, specs: Iterable[ScorerSpec]) -> None:
        self.specs = tuple(specs)
        self._check_names()
        self.scorers = {s.name: build_scorer(s.name, s.use, s.settings) for s in self.specs}
        self._states_tokens = False
        if not self.objectives:
            raise ConfigError("no scorer has the role minimize or maximize: nothing to search for")

    @property
    def objectives(self) -> tuple[ScorerSpec, ...]:
        """The scorers that steer the search, in order."""
        return tuple(spec for spec in self.specs if spec.role != "monitor")

    @property
    def refusal_rule(self) -> RefusalRule:
        """The run's rule: that of the first scorer that counts refusals of harmful prompts."""
        counts = self._refusal_counts
        return counts[0].own_rule if counts else RefusalRule()

    @property
    def counts_refusals(self) -> bool:
        """Whether a scorer counts refusals of harmful prompts."""
        return bool(self._refusal_counts)

    @property
    def lowers_refusals(self) -> bool:
        """Whether refusals of harmful prompts are counted, and not to be raised."""
        counts = self.refusal_scorers
        return any(spec.name in counts and spec.role != "maximize" for spec in self.specs)

    @property
    def refusal_objectives(self) -> list[str]:
        """Names of the objectives that count refusals of harmful prompts."""
        counts = self.refusal_scorers
        return [spec.name for spec in self.objectives if spec.name in counts]

    @property
    def limited(self) -> str:
        """Name of the scorer whose share `target_refusals` limits.

        The one named `refusals`, else the first that counts refusals and is not to raise them.
        """
        names = [s.name for s in self.specs if s.name in self.refusal_scorers]
        lowering = [s.name for s in self.specs if s.name in names and s.role != "maximize"]
        return REFUSALS if REFUSALS in names or not lowering else lowering[0]

    @property
    def refusal_scorers(self) -> set[str]:
        """Names of the scorers that count refusals of harmful prompts."""
        return {count.name for count in self._refusal_counts}

    @property
    def _refusal_counts(self) -> list[RefusalCount]:
        counts = (scorer for scorer in self.scorers.values() if isinstance(scorer, RefusalCount))
        return [count for count in counts if count.kind == "harmful"]

    def check(self) -> None:
        """Check what the scorers need besides the model.

        Raises:
            HereticKLError: see `Scorer.check`.
        """
        for name, scorer in self.scorers.items():
            with _blamed_on(name):
                scorer.check()

    def judging(self) -> dict[str, Mapping[str, Any]]:
        """What judges behind servers were asked so far, by scorer; see `Scorer.judging`."""
        used = {name: scorer.judging() for name, scorer in self.scorers.items()}
        return {name: counts for name, counts in used.items() if counts.get("requests")}

    def prepare(self, context: ScorerContext, *, states_tokens: bool = False) -> None:
        """Prepare every scorer; measures nothing of any candidate.

        With `states_tokens` the text of a score says over how many positions it is: other scores of
        its scorer are over others.
        """
        self._states_tokens = states_tokens
        for spec in self.specs:
            with _blamed_on(spec.name):
                self.scorers[spec.name].prepare(replace(context, role=spec.role))

    def requests(self) -> list[Request]:
        """What all scorers need of every candidate."""
        return [request for spec in self.specs for request in self._ask(spec)]

    def evaluate(
        self, engine: MeasuringEngine, plan: Plan | None, *, monitors: bool = True
    ) -> dict[str, Score]:
        """Scores of one candidate (None: the unedited model), in the order of the config.

        Without `monitors` objectives alone are measured.

        Raises:
            MeasurementError: an objective has no value.
            ScorerError: a scorer raised.
        """
        specs = self.specs if monitors else self.objectives
        flat, places = self._asked(specs)
        with _blamed_on(", ".join(places)):
            results = engine.measure(plan, flat)
        return {spec.name: self._score(spec, results[places[spec.name]]) for spec in specs}

    def evaluate_objectives(
        self,
        engine: MeasuringEngine,
        plans: Sequence[Plan],
        *,
        rivals: Sequence[Rival] = (),
        names: Collection[str] | None = None,
    ) -> list[dict[str, Score] | Stopped]:
        """Scores of several candidates that run side by side, objectives only.

        A candidate that one of the rivals, finished trials, surely beats is measured no further.
        With `names` only those objectives are measured.

        Raises:
            MeasurementError: an objective of any of them has no value.
            ScorerError: a scorer raised.
        """
        specs = [s for s in self.objectives if names is None or s.name in names]
        flat, places = self._asked(specs)
        judges = [
            Judge(spec.name, spec.role, partial(self._score, spec), partial(self._bounds, spec))
            for spec in specs
        ]
        race = Race(judges, places, rivals) if rivals else None
        with _blamed_on(", ".join(places)):
            measured = engine.measure_many(plans, flat, race)
        outcomes: list[dict[str, Score] | Stopped] = []
        for candidate, results in enumerate(measured):
            if results is None:
                assert race is not None  # only a race ends a candidate
                outcomes.append(race.stopped[candidate])
            else:
                scores = {judge.name: judge.score(results[places[judge.name]]) for judge in judges}
                outcomes.append(scores)
        return outcomes

    def _asked(self, specs: Sequence[ScorerSpec]) -> tuple[list[Request], dict[str, slice]]:
        """All requests in a row, and where each scorer's stand."""
        flat: list[Request] = []
        places = {}
        for spec in specs:
            requests = self._ask(spec)
            places[spec.name] = slice(len(flat), len(flat) + len(requests))
            flat += requests
        return flat, places

    @on_first
    def _score(self, spec: ScorerSpec, results: Sequence[Result]) -> Score:
        with _blamed_on(spec.name):
            score = self.scorers[spec.name].score(results)
            values = self.scorers[spec.name].per_prompt(results)
        score = self._with_tokens(spec, score)
        value = score.optimized
        if spec.role != "monitor" and (value is None or not math.isfinite(value)):
            raise MeasurementError(f"scorer {spec.name!r} gave no value: {score.text}")
        if values is None:
            return score
        return replace(score, per_prompt=tuple(values))

    def _with_tokens(self, spec: ScorerSpec, score: Score) -> Score:
        """The score, with the number of positions N that its scorer compares where it does so."""
        requests = (r for r in self._ask(spec) if isinstance(r, TeacherForcedRequest))
        tokens = max((request.tokens for request in requests), default=None)
        if tokens is None:
            return score
        text = score.text
        if self._states_tokens:
            over = f" over {tokens} position{'s' if tokens != 1 else ''}"
            text = text.replace(" nats", f" nats{over}", 1) if " nats" in text else text + over
        return replace(score, text=text, details={KL_TOKENS: tokens, **score.details})

    @on_first
    def _bounds(self, spec: ScorerSpec, results: Sequence[SoFar]) -> Bounds:
        with _blamed_on(spec.name):
            return self.scorers[spec.name].bounds(results)

    def _ask(self, spec: ScorerSpec) -> list[Request]:
        with _blamed_on(spec.name):
            return list(self.scorers[spec.name].requests())

    def _check_names(self) -> None:
        seen: dict[str, str] = {}
        for spec in self.specs:
            plain = re.sub(r"[-_\s]+", "", spec.name).lower()
            if plain in seen:
                raise ConfigError(f"scorers {seen[plain]!r} and {spec.name!r} share a name")
            seen[plain] = spec.name


def summed_judging(parts: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Several of `Suite.judging` as one."""
    sums: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, counts in part.items():
            total = sums.setdefault(name, {"by": str(counts.get("by"))})
            for key in (key for key in JUDGING if key in counts):
                total[key] = total.get(key, 0) + counts[key]
    return sums


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    """A plug-in may raise anything: one line that names it, and the search can go on."""
    try:
        yield
    except (HereticKLError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ScorerError(f"scorer {name!r} failed: {type(error).__name__}: {error}") from error
