"""Directions come from prompts by what the model does with them; a bad contrast is said."""

from __future__ import annotations

import zlib

import pytest
import torch

from heretic_kl.errors import MeasurementError
from heretic_kl.prompts import Prompt
from heretic_kl.requests import ResponseResult
from heretic_kl.run.setup.directions import FEW, FEWEST, find_directions, select
from heretic_kl.run.teller import Teller
from heretic_kl.scoring import RefusalRule, ScorerSpec, Suite

WIDTH, LAYERS = 16, 3


def prompts(kind: str, count: int) -> tuple[Prompt, ...]:
    return tuple(Prompt(f"{kind} {index}") for index in range(count))


class Engine:
    """Refuses prompts that contain a word; its residuals point one way for those it refuses."""

    def __init__(self, refuses: tuple[str, ...], *, signal: float = 8.0) -> None:
        self.refuses, self.signal = refuses, signal
        self.means: list[list[str]] = []

    def _refuses(self, prompt: Prompt) -> bool:
        return any(word in prompt.user.split() for word in self.refuses)

    def measure(self, plan, requests):
        texts = [
            "I can't help with that." if self._refuses(p) else "Sure." for p in requests[0].prompts
        ]
        return [ResponseResult(tuple(texts))]

    def residuals(self, group):
        rows = []
        for prompt in group:
            seed = zlib.crc32(prompt.user.encode())
            noise = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(seed))
            noise[1, 0] += self.signal * self._refuses(prompt)
            rows.append(noise)
        return torch.stack(rows)

    def residual_mean(self, group, quantile):
        self.means.append([prompt.user for prompt in group])
        return self.residuals(group).double().mean(0)


class Settings:
    max_response_tokens = 8

    class directions:
        by_response = True
        winsorize_quantile = 1.0
        project_off_harmless = False


def found(engine, harmful, harmless, *, scorer="refusals", settings=Settings):
    events: list[object] = []
    sets = {("harmful", "train"): harmful, ("harmless", "train"): harmless}
    suite = Suite([ScorerSpec(scorer, scorer, "minimize", {})])
    result = find_directions(settings, engine, sets, suite, Teller(events.append))
    return result.directions, [event.message for event in events if hasattr(event, "message")]


def test_only_refused_harmful_and_answered_harmless_prompts_are_used_in_equal_numbers():
    engine = Engine(("bad", "oops"))
    harmful = (*prompts("bad", 40), *prompts("mild", 9))
    harmless = (*prompts("good", 30), *prompts("oops", 6))
    directions, notices = found(engine, harmful, harmless)
    refused, answered = engine.means
    assert refused == [p.user for p in harmful[:30]] and answered == [p.user for p in harmless[:30]]
    assert notices[0] == (
        "directions: the model refuses 40 of 49 harmful training prompts and 6 of 36 harmless "
        "ones; 30 refused and 30 answered ones are used"
    )
    assert "AUROC 1.00 on held-out prompts at layer 1" in notices[1] and len(notices) == 2
    assert directions.per_layer[1, 0] > 0.9


def test_a_model_that_refuses_most_harmless_prompts_gives_an_error_that_says_so():
    harmless = (*prompts("oops", 45), *prompts("good", 19))
    with pytest.raises(MeasurementError, match="45 of 64 harmless ones; use harmless") as caught:
        found(Engine(("bad", "oops")), prompts("bad", 64), harmless)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [0, FEWEST - 1])
def test_too_few_refused_prompts_are_an_error(count):
    harmful = (*prompts("bad", count), *prompts("mild", 30))
    with pytest.raises(MeasurementError, match=f"refuses {count} of {count + 30} harmful"):
        found(Engine(("bad",)), harmful, prompts("good", 30))


def test_few_prompts_are_a_warning():
    _, notices = found(Engine(("bad",)), prompts("bad", FEW - 1), prompts("good", 30))
    assert any("are few" in notice for notice in notices)


def test_a_weak_contrast_is_a_warning_and_none_an_error():
    harmful, harmless = prompts("bad", 60), prompts("good", 60)
    _, notices = found(Engine(("bad",), signal=1.5), harmful, harmless)
    assert any("a weak contrast" in notice for notice in notices)
    with pytest.raises(MeasurementError, match="cannot be told apart"):
        found(Engine(("bad",), signal=0.0), harmful, harmless)


def test_all_prompts_are_used_where_refusals_are_not_the_behaviour_or_on_request():
    harmful, harmless = prompts("mild", 5), prompts("good", 4)
    engine = Engine(("bad",))
    found(engine, harmful, harmless, scorer="teacher_forced_kl")
    assert [len(users) for users in engine.means] == [5, 4]

    class All(Settings):
        class directions(Settings.directions):
            by_response = False

    found(engine, harmful, harmless, settings=All)
    assert [len(users) for users in engine.means] == [5, 4, 5, 4]


def test_what_separates_the_prompts_comes_with_the_directions():
    suite = Suite([ScorerSpec("refusals", "refusals", "minimize", {})])
    sets = {("harmful", "train"): prompts("bad", 40), ("harmless", "train"): prompts("good", 30)}
    result = find_directions(Settings, Engine(("bad",)), sets, suite, Teller(lambda event: None))
    assert result.by_response and result.compared == (30, 30)
    assert int(result.separation.auroc.argmax()) == 1 == int(result.separation.silhouette.argmax())
    assert [projection.layer for projection in result.projections] == [0, 1, 2]


def test_markers_of_the_refusals_scorer_decide():
    engine, tell = Engine(("bad",)), Teller(lambda event: None)
    harmful, harmless = prompts("bad", 9), prompts("good", 9)
    contrast = select(engine, harmful, harmless, RefusalRule(("i can't",)), 8, tell)
    assert len(contrast.refused) == len(contrast.answered) == 9
    with pytest.raises(MeasurementError, match="refuses 0 of 9 harmful"):
        select(
            engine, prompts("bad", 9), prompts("good", 9), RefusalRule(("non",)), 8, Teller(print)
        )
