"""Runs trials: edits from the study, measured by the engine. One step of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from heretic_kl.ablation import EditParameters, Plan
from heretic_kl.events import TrialFinished
from heretic_kl.ranks import from_first
from heretic_kl.run.parts import RunParts
from heretic_kl.run.trials.screening import screening
from heretic_kl.scoring import Score, Stopped
from heretic_kl.search import Screened, crowded_bounds

SHARE_OF_MINUTES = 0.2
"""Of the time that a user gives, where refinement follows."""


def search(run: RunParts, until: int) -> None:
    """Run trials until the study holds `until` finished ones, or the time for them is over.

    Raises:
        StudyError: several trials in a row failed.
    """
    study, settings = run.study, run.settings
    rungs, log = screening(run), run.response_log
    log.announce(run.suite)
    begun: list[tuple[EditParameters, Plan]] = []

    def evaluate(
        edits: Sequence[EditParameters],
    ) -> Sequence[dict[str, Score] | Screened | Stopped]:
        plans = [run.plan(edit) for edit in edits]
        log.forget()
        begun[:] = zip(edits, plans, strict=True)
        if rungs is not None:
            return rungs.evaluate(plans)
        rivals = study.front if settings.racing else ()
        return run.suite.evaluate_objectives(log.engine, plans, rivals=rivals)

    candidates = settings.parallel_candidates if run.lm.capabilities.rows_problem is None else 1
    with run.tell.stage("search", "Searching", until):
        start, before = time.perf_counter(), study.finished
        deadline = run.begun + _search_seconds(run)
        trials = study.run(
            until,
            evaluate,
            candidates=candidates,
            notify=run.tell.notice,
            stop=lambda: from_first(lambda: time.perf_counter() >= deadline),
        )
        for record in trials:
            for edit, plan in begun:
                if edit == record.edit and record.state == "complete":
                    log.write(record.number, plan, "validation", run.suite)
            finished = study.finished
            pace = (time.perf_counter() - start) / max(1, finished - before)
            seconds_left = min(pace * (until - finished), deadline - time.perf_counter())
            run.tell(TrialFinished(record, finished, until, study.front, max(0.0, seconds_left)))
    if rungs is not None:
        rungs.tell()
    crowded = crowded_bounds([record.parameters for record in study.front])
    if crowded:
        run.tell.notice(
            f"most trials of the front lie at the end of a range ({', '.join(crowded)}): edits "
            "beyond it, which are not searched, may be better"
        )


def _search_seconds(run: RunParts) -> float:
    """Time for the search; infinite where the user sets none."""
    settings = run.settings
    if settings.minutes is None:
        return float("inf")
    return settings.minutes * 60 * (SHARE_OF_MINUTES if settings.learns else 1)
