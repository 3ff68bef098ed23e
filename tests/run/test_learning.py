"""What refinement starts from, when it goes on and when it stops."""

from types import SimpleNamespace

import pytest
from sessions import refining

from heretic_kl import Settings, events
from heretic_kl.errors import MeasurementError
from heretic_kl.refine.training import _Learner
from heretic_kl.run.trials import refine
from heretic_kl.scoring import Score


def test_a_clock_that_leaves_time_goes_on_while_no_trial_meets_the_target():
    def misses(share, minutes=5.0):
        score = Score(share, "", details={"count": round(share * 100), "total": 100})
        return refine._misses_in_time(
            SimpleNamespace(
                settings=Settings(minutes=minutes, target_refusals=0.05),
                suite=SimpleNamespace(limited="refusals"),
                study=SimpleNamespace(records=[SimpleNamespace(scores={"refusals": score})]),
            )
        )

    assert misses(0.2) and not misses(0.0) and not misses(0.2, minutes=None)


def test_time_that_the_search_leaves_over_is_refinements(refusing, tmp_path, markers, monkeypatch):
    run, _ = refining(refusing, tmp_path, markers, minutes=10.0)
    with run:
        run.search()
        begun, clock = run.parts.begun, "heretic_kl.run.trials.refine.time.perf_counter"
        monkeypatch.setattr(clock, lambda: begun + 400.0)
        assert refine._deadline(run.parts) == begun + 600.0


def test_refusals_under_another_name_limit_refinement_too(refusing, tmp_path, markers):
    table = {"use": "refusals", "settings": {"markers": markers}}
    scorers = {"refusals": {"enabled": False}, "mine": table}
    run, seen = refining(refusing, tmp_path, markers, scorers=scorers)
    with run:
        assert run.parts.suite.limited == "mine"
        run.search()
        run.refine()
        assert len(run.parts.study.refined) == 2
    notices = [event.message for event in seen if isinstance(event, events.Notice)]
    assert any("responses" in text and "validation KL" in text for text in notices)


@pytest.mark.parametrize(("fails_at", "learned"), [(2, 0), (5, 2)])
def test_a_loss_that_is_not_finite_ends_the_steps_and_keeps_earlier_checks(
    refusing, tmp_path, markers, monkeypatch, fails_at, learned
):
    taken, step = [0], _Learner.step

    def failing(self):
        taken[0] += 1
        if taken[0] % 6 == fails_at:
            raise MeasurementError("the loss of the refinement is not finite")
        step(self)

    monkeypatch.setattr(_Learner, "step", failing)
    monkeypatch.setattr("heretic_kl.refine.training.RefineOptions.check_every", 3, raising=False)
    run, _ = refining(refusing, tmp_path, markers)
    with run:
        run.search()
        monkeypatch.setattr(_Learner, "is_checked", lambda self, at: at == 4)
        run.refine()
        assert len(run.parts.study.refined) == learned
