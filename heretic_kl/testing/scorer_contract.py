"""What every scorer must do, as a test class to inherit. Runs no model.

    class TestMyScorer(ScorerContract):
        use = "plugins/my_scorer.py"
        settings = {"limit": 5}

pytest then runs every law below on the scorer, with prompts and results from `fakes`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from heretic_kl.ablation import Plan
from heretic_kl.errors import ConfigError
from heretic_kl.requests import (
    ModelRequest,
    PartialResponses,
    PartialRows,
    Request,
    ResponseRequest,
    ResponseResult,
    Result,
    SoFar,
    TeacherForcedRequest,
    TeacherForcedResult,
)
from heretic_kl.scoring import Score, Scorer, ScorerContext, build_scorer
from heretic_kl.testing.fakes import FakeEngine, fake_context, fake_plan


class ScorerContract:
    """The laws of a scorer; a subclass names the scorer and may change what it is tested with."""

    use: ClassVar[str]
    """The scorer as a config names it: a built-in name, a file or `FILE:CLASS`."""
    settings: ClassVar[Mapping[str, Any]] = {}

    # --- what a subclass may change ---

    def engine(self) -> Any:
        """What runs the requests."""
        return FakeEngine()

    def context(self, use: Literal["validation", "test"] = "validation") -> ScorerContext:
        """What the scorer prepares with."""
        return fake_context(self.engine(), use=use)

    def plans(self) -> Sequence[Plan | None]:
        """Candidates to score: the unedited model, a weak edit and a strong one."""
        return [None, fake_plan(0.1), fake_plan(1.0)]

    # --- the laws ---

    def test_unknown_settings_are_rejected_by_name(self) -> None:
        """A misspelt setting is an error, not ignored."""
        try:
            build_scorer("tested", self.use, {**self.settings, "no_such_setting": 1})
        except ConfigError as error:
            assert "no_such_setting" in str(error)
        else:
            raise AssertionError("a setting that does not exist was accepted")

    def test_every_setting_is_described(self) -> None:
        """`heretic-kl config` shows the descriptions."""
        fields = type(self._prepared().settings).model_fields
        assert [name for name, field in fields.items() if not field.description] == []

    def test_requests_are_the_same_each_time(self) -> None:
        """Equal requests are run once for all candidates, so they may not change."""
        scorer = self._prepared()
        first = list(scorer.requests())
        assert first, "a scorer that asks for nothing measures nothing of the candidate"
        assert all(isinstance(r, Request) for r in first)
        scorer.score(self._results(scorer, fake_plan()))
        assert list(scorer.requests()) == first

    def test_preparing_again_changes_nothing(self) -> None:
        """A resumed study prepares anew: requests, identity and scores are equal."""
        one, two = self._prepared(), self._prepared()
        assert dict(one.identity()) == dict(two.identity())
        assert list(one.requests()) == list(two.requests())
        results = self._results(one, fake_plan())
        assert one.score(results) == two.score(self._results(two, fake_plan()))

    def test_it_prepares_for_test_prompts_too(self) -> None:
        """Final trials are measured with the same scorer on other prompts."""
        self._check_score(self._scored(self._prepared("test"), fake_plan()))

    def test_identity_is_text(self) -> None:
        """It is stored with the study and compared."""
        for name, value in self._prepared().identity().items():
            assert isinstance(name, str) and isinstance(value, str)

    def test_scores_are_finite_and_survive_storage(self) -> None:
        """Values, intervals and details are read back from JSON as they were written."""
        scorer = self._prepared()
        for plan in self.plans():
            score = self._scored(scorer, plan)
            self._check_score(score)
            assert Score.from_dict(json.loads(json.dumps(score.to_dict()))) == score

    def test_a_score_depends_on_the_results_alone(self) -> None:
        """Scoring is a pure function: candidates may be scored in any order, and again."""
        scorer = self._prepared()
        results = [self._results(scorer, plan) for plan in self.plans()]
        forwards = [scorer.score(one) for one in results]
        backwards = [scorer.score(one) for one in reversed(results)]
        assert forwards == backwards[::-1]

    def test_the_mean_of_the_prompts_is_the_score(self) -> None:
        """Paired comparisons rest on values for each prompt, where a scorer has them."""
        scorer = self._prepared()
        for plan in self.plans():
            results = self._results(scorer, plan)
            values, value = scorer.per_prompt(results), scorer.score(results).value
            if values is not None:
                assert value is not None
                assert math.isclose(math.fsum(values) / len(values), value, rel_tol=1e-9)

    def test_bounds_hold_whatever_is_still_to_be_measured(self) -> None:
        """From no results to all but one prompt, the final objective lies between the bounds."""
        scorer = self._prepared()
        requests = list(scorer.requests())
        for plan in self.plans():
            results = self._results(scorer, plan)
            final = scorer.score(results).optimized
            assert final is not None
            for share in (0.0, 0.3, 0.6, 0.9):
                bounds = scorer.bounds(_partial(requests, results, share))
                slack = 1e-6 * max(1.0, abs(final))
                assert bounds.low - slack <= final <= bounds.high + slack, (share, bounds, final)

    # --- helpers ---

    def _prepared(self, use: Literal["validation", "test"] = "validation") -> Scorer[Any]:
        scorer = build_scorer("tested", self.use, self.settings)
        scorer.prepare(self.context(use))
        return scorer

    def _results(self, scorer: Scorer[Any], plan: Plan | None) -> list[Result]:
        results: list[Result] = self.engine().measure(plan, list(scorer.requests()))
        return results

    def _scored(self, scorer: Scorer[Any], plan: Plan | None) -> Score:
        return scorer.score(self._results(scorer, plan))

    def _check_score(self, score: Score) -> None:
        assert isinstance(score, Score)
        assert score.text, "a score needs a text for people"
        if score.value is None:
            return  # unscored, which only scorers with the role monitor may be
        assert math.isfinite(score.value)
        assert score.optimized is not None and math.isfinite(score.optimized)
        if score.interval is not None:
            low, high = score.interval
            assert low <= score.value <= high


def _partial(requests: Sequence[Request], results: Sequence[Result], share: float) -> list[SoFar]:
    """Results so far, once a share of each request's prompts has been measured."""
    return [
        None
        if isinstance(request, ModelRequest)
        else _part_of(request, result, int(share * len(request.prompts)))
        for request, result in zip(requests, results, strict=True)
    ]


def _part_of(
    request: TeacherForcedRequest | ResponseRequest, result: Result, prompts: int
) -> SoFar:
    if prompts == 0:
        return None
    if isinstance(result, ResponseResult):
        total = len(request.prompts)
        texts = tuple(text if n < prompts else "" for n, text in enumerate(result.texts))
        return PartialResponses(texts, tuple(n < prompts for n in range(total)))
    assert isinstance(result, TeacherForcedResult)
    rows = result.prompt_index < prompts
    columns = tuple(column[rows] for column in result.columns)
    if hasattr(result.columns, "_fields"):  # a NamedTuple of the reduction
        columns = type(result.columns)(*columns)
    return PartialRows(
        TeacherForcedResult(columns, result.prompt_index[rows], result.position[rows])
    )
