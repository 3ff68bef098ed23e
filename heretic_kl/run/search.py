"""Runs trials: edits from the study, measured by the engine. One step of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence

from heretic_kl.ablation import EditParameters
from heretic_kl.events import TrialFinished
from heretic_kl.run.parts import RunParts
from heretic_kl.scoring import Score, Stopped


def search(run: RunParts, until: int) -> None:
    """Run trials until the study holds `until` finished ones.

    Raises:
        StudyError: several trials in a row failed.
    """
    study, settings = run.study, run.settings

    def evaluate(edits: Sequence[EditParameters]) -> list[dict[str, Score] | Stopped]:
        plans = [run.plan(edit) for edit in edits]
        rivals = study.front if settings.racing else ()
        return run.suite.evaluate_objectives(run.engine, plans, rivals=rivals)

    candidates = settings.parallel_candidates if run.lm.architecture.by_rows else 1
    with run.tell.stage("search", "Searching", until):
        start, before = time.perf_counter(), study.finished
        for record in study.run(until, evaluate, candidates=candidates, notify=run.tell.notice):
            finished = study.finished
            pace = (time.perf_counter() - start) / max(1, finished - before)
            seconds_left = pace * (until - finished)
            run.tell(TrialFinished(record, finished, until, study.front, seconds_left))
