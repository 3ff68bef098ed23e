"""Rung 1 of a search: measures trials by teacher forcing, promotes some to responses."""

from __future__ import annotations

from collections.abc import Sequence

from heretic_kl.ablation import Plan
from heretic_kl.errors import MeasurementError
from heretic_kl.requests import TeacherForcedRequest
from heretic_kl.run.parts import RunParts
from heretic_kl.scoring import Score, Stopped
from heretic_kl.search import (
    FEWEST_PAIRS,
    LEAST_CORRELATION,
    RankCorrelation,
    Screened,
    Standing,
    TrialRecord,
    foretold,
    promotes,
)


class Screening:
    """Measures plans on rung 1, and those worth it on rung 2.

    Args:
        run: the run.
        counted: the objective that counts refused responses, which rung 1 predicts.
    """

    def __init__(self, run: RunParts, counted: str) -> None:
        self._run = run
        self._counted = counted
        self._others = [s.name for s in run.suite.objectives if s.name != counted]
        self._trusted = True

    def evaluate(self, plans: Sequence[Plan]) -> list[Screened]:
        """Outcomes of trials, in order."""
        run = self._run
        first = run.suite.evaluate_objectives(run.response_log.engine, plans, names=self._others)
        outcomes: list[Screened] = []
        standings = [s for s in map(self._standing, run.study.records) if s is not None]
        for place, plan, scores in zip(run.study.places, plans, first, strict=True):
            assert not isinstance(scores, Stopped)  # nothing races
            mass = float(run.refiner.refusal_mass(plan).mean())
            others = tuple(self._objective(scores[name], name) for name in self._others)
            promoted = not self._trusts() or promotes(
                place,
                Standing(mass, others),
                standings,
                target=run.settings.target_refusals,
            )
            if promoted:
                scores = self.counted(plan, scores)
                standings.append(Standing(scores[self._counted].optimized or 0.0, others))
            outcomes.append(Screened(scores, {self._counted: mass}, promoted))
        return outcomes

    def counted(self, plan: Plan, scores: dict[str, Score]) -> dict[str, Score]:
        """All objectives of a plan, in the order of the config, from those of rung 1."""
        run = self._run
        engine = run.response_log.engine
        (more,) = run.suite.evaluate_objectives(engine, [plan], names=[self._counted])
        assert not isinstance(more, Stopped)
        measured = {**scores, **more}
        return {spec.name: measured[spec.name] for spec in run.suite.objectives}

    def correlation(self) -> RankCorrelation | None:
        """How well rung 1 foretells rung 2."""
        return foretold(self._run.study.records, self._counted)

    def tell(self) -> None:
        """Say how many trials generated responses, and what rung 1 is worth."""
        searched = (record for record in self._run.study.records if not record.refinement)
        records = [record for record in searched if self._counted in record.predicted]
        promoted = sum(record.state == "complete" for record in records)
        correlation = self.correlation()
        quality = "" if correlation is None else f"; rank correlation of both: {correlation}"
        self._run.tell.notice(
            f"{promoted} of {len(records)} trials generated responses; the others were screened "
            f"out by their probability of opening with a refusal{quality}"
        )

    def _trusts(self) -> bool:
        """Whether rung 1 foretells rung 2 well enough; says so once where it does not."""
        if self._trusted:
            correlation = self.correlation()
            if correlation and correlation.pairs >= FEWEST_PAIRS:
                self._trusted = correlation.value >= LEAST_CORRELATION
            if not self._trusted:
                self._run.tell.notice(
                    f"every trial generates responses from here on: the probability of opening "
                    f"with a refusal foretells them badly (rank correlation {correlation})"
                )
        return self._trusted

    def _standing(self, record: TrialRecord) -> Standing | None:
        if record.state != "complete":
            return None
        return Standing(
            record.scores[self._counted].optimized or 0.0,
            tuple(self._objective(record.scores[name], name) for name in self._others),
        )

    def _objective(self, score: Score, name: str) -> float:
        value = score.optimized
        assert value is not None  # the suite refuses objectives without a value
        (spec,) = (spec for spec in self._run.suite.objectives if spec.name == name)
        return -value if spec.role == "maximize" else value


def screening(run: RunParts) -> Screening | None:
    """The rungs of a run; None where every trial generates responses, with a notice why."""
    if not run.settings.screens:
        return None
    responding = [
        spec
        for spec in run.suite.objectives
        if not all(
            isinstance(request, TeacherForcedRequest)
            for request in run.suite.scorers[spec.name].requests()
        )
    ]
    names = [spec.name for spec in responding]
    if not names:
        return None
    if names != run.suite.refusal_objectives or responding[0].role != "minimize":
        run.tell.notice(
            f"every trial generates responses: nothing predicts {', '.join(names)} without them"
        )
        return None
    try:
        run.refiner  # noqa: B018 (built, or the reason why it cannot be)
    except MeasurementError as error:
        run.tell.notice(f"every trial generates responses: {error}")
        return None
    return Screening(run, names[0])
