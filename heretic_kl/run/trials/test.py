"""Measures final trials on the test prompts, once each. One step of a run."""

from __future__ import annotations

from collections.abc import Mapping

from heretic_kl.errors import SelectionError
from heretic_kl.events import BaselineMeasured, TrialTested
from heretic_kl.run.parts import RunParts
from heretic_kl.run.report_record import record_test, test_responses
from heretic_kl.scoring import Score
from heretic_kl.search import UNEDITED, spread


def test_front(run: RunParts) -> None:
    """Measure at most `test_trials` of the front that were not measured yet.

    Where the front is longer, trials are taken evenly along it, the ends included.
    """
    chosen = spread(run.study.front, run.settings.test_trials)
    untested = [record for record in chosen if run.study.test_scores(record.number) is None]
    if not untested:
        return
    with run.tell.stage("test", "Measuring the front on the test prompts", len(untested)):
        test_baseline(run)
        for record in untested:
            test_one(run, record.number)
            run.tell.advance("test", f"trial {record.number}")


def test_one(run: RunParts, number: int) -> Mapping[str, Score]:
    """A trial's scores on the test prompts, measured now if they were not before.

    Raises:
        SelectionError: there is no such trial, or it has no edit.
    """
    stored = run.study.test_scores(number)
    if stored is not None:
        return stored
    records = [record for record in run.study.records if record.number == number]
    if not records or records[0].edit is None:
        raise SelectionError(f"no finished trial {number} to measure on the test prompts")
    plan = run.plan(records[0].edit)
    scores = run.test_suite.evaluate(run.response_log.engine, plan)
    responses = test_responses(run, plan)
    run.study.keep_test_scores(number, scores)
    run.response_log.write(number, plan, "test", run.test_suite)
    record_test(run, records[0], responses)
    run.tell(TrialTested(records[0], scores))
    return scores


def test_baseline(run: RunParts) -> Mapping[str, Score]:
    """The unedited model's scores on the test prompts, measured now if they were not before."""
    stored = run.study.test_scores(UNEDITED)
    if stored is not None:
        return stored
    scores = run.test_suite.evaluate(run.response_log.engine, None)
    test_responses(run, None)
    run.study.keep_test_scores(UNEDITED, scores)
    run.response_log.write(UNEDITED, None, "test", run.test_suite)
    run.tell(BaselineMeasured("test", scores))
    return scores
